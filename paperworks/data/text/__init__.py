"""Texts as data: corpora, windows, words."""

from paperworks.data.text.texts import Records, Text, load_records, load_text, names, split

__all__ = ["Records", "Text", "load_records", "load_text", "names", "split"]
