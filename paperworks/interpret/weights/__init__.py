"""Analysis of the weights themselves."""
