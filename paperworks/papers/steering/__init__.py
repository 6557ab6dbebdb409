"""Papers on steering."""
