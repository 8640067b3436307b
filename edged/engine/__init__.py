"""What runs inside a worker process: llama.cpp and the order of its work."""
