"""GGUF files: reading, writing, and the models in them."""

from paperworks.checkpoints.gguf.reader import read
from paperworks.checkpoints.gguf.writer import write

__all__ = ["read", "write"]
