"""How good an autoencoder is, and what its features mean."""
