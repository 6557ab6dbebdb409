"""Papers on adapting a trained model by training few parameters."""
