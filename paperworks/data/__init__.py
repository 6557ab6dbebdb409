"""Tokenizers, chat templates, named weights and data sets, synthetic tasks: `from paperworks.data import assets`.

assets      real weights by name, fetched once and verified
text        public data sets by name
tokenizers  text to ids and back
chat        conversations as text, in a sandbox
windows     stretches of a text as batches
corpus      documents to pretrain on, and a tokenizer that fits them
othello     Othello of 4, 6 and 8 squares: rules, random games, board labels
recall      tasks of memory: selective copying, induction, associative recall
algorithmic tasks whose every answer is known
"""
