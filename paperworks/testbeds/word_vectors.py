"""What the papers of word vectors share: a corpus with planted relations, and training as published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks import train
from paperworks.data.text.word_contexts import WordContexts, WordVocabulary
from paperworks.lab import Lab
from paperworks.models.classic.word_vectors import WordVectorModel, WordVectors, word_vector_loss
from paperworks.testbeds.relations import RelationCorpus, question_ids
from paperworks.testbeds.training import fit

DIM, WINDOW, NEGATIVES = 64, 5, 5


@dataclass(frozen=True)
class Planted:
    """Sentences of a `RelationCorpus` as ids, and its questions."""

    vocabulary: WordVocabulary
    tokens: Int[Tensor, " tokens"]
    sentences: Int[Tensor, " tokens"]
    questions: Int[Tensor, "questions 4"]


@cache
def planted(sentences: int, seed: int) -> Planted:
    """20 countries by {name, capital, adjective}, ten words a sentence."""
    corpus = RelationCorpus(sentences=sentences)
    written = corpus.draw(seed)
    vocabulary = WordVocabulary.of(written, min_count=1)
    tokens, places = vocabulary.encode(written)
    return Planted(vocabulary, tokens, places, question_ids(corpus.questions(), vocabulary.index))


def corpus_of(lab: Lab, seed: int) -> Planted:
    """The corpus of a scale: 200,000 words."""
    return planted(lab.pick(smoke=400, small=20_000), seed)


def taught(
    lab: Lab, spec: WordVectors, batches: WordContexts, counts: tuple[int, ...], epochs: int, rate: float, seed: int
) -> WordVectorModel:
    """Train as published: plain SGD on the sum over pairs, the rate falling linearly to nothing."""
    model = spec.build(counts)
    with lab.threads(1):
        fit(
            model, word_vector_loss, batches, steps=epochs * len(batches), lr=rate, seed=seed,
            schedule="linear", warmup=0, min_lr=0, optimizer=train.SGD(), clip=None,
        )  # fmt: skip
    return model.eval()


def context_counts(corpus: Planted, window: int = WINDOW) -> Float[Tensor, "words words"]:
    """How often two words stand within a window of each other, in float64."""
    size = len(corpus.vocabulary)
    counts = torch.zeros(size, size, dtype=torch.float64)
    for distance in range(1, window + 1):
        same = corpus.sentences[distance:] == corpus.sentences[:-distance]
        first, second = corpus.tokens[:-distance][same], corpus.tokens[distance:][same]
        counts.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    return counts + counts.T
