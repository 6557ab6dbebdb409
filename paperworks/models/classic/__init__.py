"""Models from before the transformer."""
