"""ggml's block formats, decoded and encoded."""
