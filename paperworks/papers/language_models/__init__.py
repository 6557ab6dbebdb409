"""Papers on language models and their parts."""
