"""Attention as algorithms to read: tiled (FlashAttention) and spread over a tree of processes."""
