"""Directions that change what a model does."""
