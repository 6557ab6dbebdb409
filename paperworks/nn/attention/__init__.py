"""Attention: scores, masks, caches, and the variants of it."""
