"""Interpolated Kneser-Ney n-grams (Kneser & Ney 1995; Chen & Goodman 1999): the counts that neural models must beat."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Gram = tuple[int, ...]


class KneserNey:
    """p_n(w | h) = max(c(h w) - D_n, 0) / c(h) + D_n N(h) / c(h) p_{n-1}(w | h without its first word).

    c counts n-grams at the highest order; below, it counts the different words seen before one. c(h) is the sum of
    c(h w) over w, N(h) the number of different w. A history never seen gives its weight to the shorter one; below the
    single words stands 1 / vocab_size. D_n = n1 / (n1 + 2 n2), n1 and n2 the n-grams with counts 1 and 2; or 1/2 where
    none has count 1, so that no word gets probability 0.

    Args:
        tokens: ids of the text to count, 0 to vocab_size - 1; one text, in one piece.
        vocab_size: ids there are.
        order: words in the longest n-gram.

    Raises ValueError for an order below 1, a text that is too short for it, or an id outside the vocabulary.
    """

    def __init__(self, tokens: Sequence[int], vocab_size: int, order: int = 5) -> None:
        words = list(map(int, tokens))
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if len(words) < order:
            raise ValueError(
                f"a text of {len(words)} tokens holds no {order}-gram; take a lower order or a longer text"
            )
        if not 0 <= min(words) <= max(words) < vocab_size:
            wrong = min(words) if min(words) < 0 else max(words)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
        self.vocab_size, self.order = vocab_size, order
        self.counts: list[Counter[Gram]] = []  # by length, from 1
        for size in range(1, order):
            longer = set(_grams(words, size + 1))
            self.counts.append(Counter(gram[1:] for gram in longer))
        self.counts.append(Counter(_grams(words, order)))
        self.discounts = [_discount(counts) for counts in self.counts]
        self.totals: list[defaultdict[Gram, int]] = []
        self.kinds: list[defaultdict[Gram, int]] = []
        for counts in self.counts:
            totals: defaultdict[Gram, int] = defaultdict(int)
            kinds: defaultdict[Gram, int] = defaultdict(int)
            for gram, count in counts.items():
                totals[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            self.totals.append(totals)
            self.kinds.append(kinds)

    def probability(self, word: int, history: Sequence[int]) -> float:
        """p(word | history), of which the last order - 1 words count."""
        past = tuple(history)[max(0, len(history) - self.order + 1) :]
        value = 1.0 / self.vocab_size
        for size in range(1, len(past) + 2):
            context = past[len(past) - size + 1 :]
            total = self.totals[size - 1].get(context, 0)
            if total == 0:
                break  # no longer history was seen either
            discount = self.discounts[size - 1]
            kept = max(self.counts[size - 1].get((*context, word), 0) - discount, 0.0)
            value = (kept + discount * self.kinds[size - 1][context] * value) / total
        return value

    def log_probabilities(self, tokens: Sequence[int]) -> Float[Tensor, " scored"]:
        """log p of every token but the first, given those before it."""
        words, reach = list(map(int, tokens)), self.order - 1
        values = [self.probability(words[at], words[max(0, at - reach) : at]) for at in range(1, len(words))]
        return torch.tensor(values, dtype=torch.float64).log()


def _grams(words: list[int], size: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(size)), strict=False)


def _discount(counts: Counter[Gram]) -> float:
    once = sum(count == 1 for count in counts.values())
    twice = sum(count == 2 for count in counts.values())
    return once / (once + 2 * twice) if once else 0.5
