"""From a manifest to a verified GGUF file on disk."""
