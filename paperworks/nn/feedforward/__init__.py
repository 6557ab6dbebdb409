"""Parts that work on each position by itself."""
