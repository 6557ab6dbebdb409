"""Weights set to zero: magnitude, Wanda, SparseGPT, Effort."""
