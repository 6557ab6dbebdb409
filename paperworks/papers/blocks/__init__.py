"""Papers on norms and activations."""
