"""Papers on sparsity."""
