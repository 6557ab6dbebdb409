"""Texts as data: corpora, windows, words."""
