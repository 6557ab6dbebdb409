"""Papers on probing."""
