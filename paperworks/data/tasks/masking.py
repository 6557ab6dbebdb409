"""Masked-language and next-sentence data, as BERT is trained on (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100


class Masked(NamedTuple):
    """Tokens with some hidden, and what stood there; -100 where nothing is asked."""

    tokens: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]


def mask_tokens(
    tokens: Int[Tensor, "batch time"],
    *,
    mask: int,
    vocab_size: int,
    never: Bool[Tensor, "batch time"] | None = None,
    share: float = 0.15,
    masked: float = 0.8,
    random: float = 0.1,
    generator: torch.Generator | None = None,
) -> Masked:
    """Choose a share of the tokens; of these `masked` become the mask, `random` any token, the others stay.

    Args:
        tokens: int64 ids.
        mask: the id of the mask.
        vocab_size: replacements are drawn from all of it, special tokens included, as the released code does.
        never: True where a token must not be chosen (separators, padding).
        share: of the tokens that are chosen, each by itself.
        masked, random: shares of the chosen ones; together at most 1.

    Raises:
        ValueError: for shares that cannot be.
    """
    if not 0 < share <= 1 or masked < 0 or random < 0 or masked + random > 1:
        raise ValueError(f"shares must be in [0, 1] and masked + random at most 1, got {share}, {masked} and {random}")
    if not 0 <= mask < vocab_size:
        raise ValueError(f"mask must be an id of the vocabulary of {vocab_size}, got {mask}")
    chosen = torch.rand(tokens.shape, generator=generator) < share
    if never is not None:
        chosen &= ~never
    fate = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(vocab_size, tokens.shape, generator=generator)
    hidden = torch.where(chosen & (fate < masked), mask, tokens)
    hidden = torch.where(chosen & (fate >= masked) & (fate < masked + random), other, hidden)
    return Masked(hidden, torch.where(chosen, tokens, IGNORED))


class SentencePairs(NamedTuple):
    """[CLS] A [SEP] B [SEP], and whether B does not follow A.

    tokens, token_types, segments: int64 (batch, time); 0 in segments is padding. is_random: 0 true next, 1 random.
    """

    tokens: Int[Tensor, "batch time"]
    token_types: Int[Tensor, "batch time"]
    segments: Int[Tensor, "batch time"]
    is_random: Int[Tensor, " batch"]


def sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]],
    count: int,
    *,
    start: int,
    separator: int,
    generator: torch.Generator,
    padding: int = 0,
) -> SentencePairs:
    """Draw pairs of sentences; half of the time the second one follows the first in its document, else it is another's.

    Args:
        documents: documents of sentences of ids.
        count: pairs.
        start, separator, padding: ids of [CLS], [SEP], [PAD].

    Raises:
        ValueError: when there are fewer than two documents, or one without two sentences.
    """
    if len(documents) < 2 or min(map(len, documents)) < 2:
        raise ValueError("next-sentence pairs need two documents or more, each of two sentences or more")

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    rows, kinds, labels = [], [], []
    for _ in range(count):
        index = below(len(documents))
        document = documents[index]
        place = below(len(document) - 1)
        is_random = below(2)
        if is_random:
            other = documents[(index + 1 + below(len(documents) - 1)) % len(documents)]
            second = other[below(len(other))]
        else:
            second = document[place + 1]
        first = [start, *document[place], separator]
        rows.append([*first, *second, separator])
        kinds.append([0] * len(first) + [1] * (len(second) + 1))
        labels.append(is_random)
    longest = max(map(len, rows))
    return SentencePairs(
        torch.tensor([row + [padding] * (longest - len(row)) for row in rows]),
        torch.tensor([row + [0] * (longest - len(row)) for row in kinds]),
        torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        torch.tensor(labels),
    )
