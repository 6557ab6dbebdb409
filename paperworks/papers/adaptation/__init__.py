"""Papers on adaptation."""
