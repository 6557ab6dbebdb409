"""Texts, tokenizers, chat templates, tasks' inputs, and named weights and data sets.

assets      real weights and data by name, fetched once and verified: `from paperworks.data import assets`
text        corpora, windows of one long text, words and their contexts
tokenizers  text to ids and back: files of the hub, GGUF vocabularies, tiktoken's ranks, byte-level training
chat        conversations as text, by templates in a sandbox
tasks       sequences for fine-tuning, masking, span corruption
"""
