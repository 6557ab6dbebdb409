"""A model made from another: upcycling, uptraining, pruning, more tokens, interpolation."""
