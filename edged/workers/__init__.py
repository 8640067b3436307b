"""The child processes that hold the models, seen from the daemon."""
