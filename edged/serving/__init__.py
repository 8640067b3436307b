"""The models in service: a worker with its prompt format and name, and which of them gets the next request."""
