"""Papers on pretrained language models."""
