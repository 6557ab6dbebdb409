"""Tokenizers: files in and out, and trained ones."""
