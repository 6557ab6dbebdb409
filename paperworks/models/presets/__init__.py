"""Published architectures by name, one file a family line."""
