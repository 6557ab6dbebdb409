"""Papers on quantization."""
