"""Papers on attention and positions."""
