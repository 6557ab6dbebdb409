"""Papers on mixtures of experts."""
