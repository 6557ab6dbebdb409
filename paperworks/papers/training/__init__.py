"""Papers on training."""
