"""GGUF files: reading, writing, and the models in them."""
