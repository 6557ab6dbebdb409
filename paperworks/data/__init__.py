"""Tokenizers, chat templates, named weights and data sets, synthetic tasks: `from paperworks.data import assets`.

assets      real weights by name, fetched once and verified
text        public data sets by name
tokenizers  text to ids and back
chat        conversations as text, in a sandbox
rank_tokenizer  byte-pair encoding by ranks, as tiktoken does it
byte_bpe    learning such ranks; byte_decoding reads as many characters from bytes as they hold
windows     stretches of a text as batches
corpus      documents to pretrain on, and a tokenizer that fits them
othello     Othello of 4, 6 and 8 squares: rules, random games, board labels
recall      tasks of memory: selective copying, induction, associative recall
orders      sequences in any order, for models that can be asked for a position
markov      strings with forbidden transitions, and what is exactly known about gaps in them
word_contexts, phrases  what word vectors are trained on
task_inputs texts, pairs and choices as sequences for fine-tuning
strokes     handwriting as pen offsets
algorithmic tasks whose every answer is known
"""
