"""Views of what a model computes for one prompt."""
