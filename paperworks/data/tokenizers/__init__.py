"""Tokenizers: files in and out, and trained ones."""

from paperworks.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, TextStream, Tokenizer, train_bpe

__all__ = ["ByteTokenizer", "CharTokenizer", "TextStream", "Tokenizer", "train_bpe"]
