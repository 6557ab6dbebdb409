"""Papers on sparse autoencoders."""
