"""Interpretability and safety: what is inside a network, and what it is for."""
