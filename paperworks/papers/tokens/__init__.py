"""Papers on words and tokens."""
