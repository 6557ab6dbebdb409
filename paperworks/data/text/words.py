"""A text as words, the rare ones of one class (Mikolov et al. 2010)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = re.compile(r"\n|[A-Za-z]+(?:'[A-Za-z]+)*|[^\sA-Za-z]")


def split_words(text: str) -> list[str]:
    """Words, marks one by one, and the ends of lines."""
    return _WORD.findall(text)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a text that are seen often, and one class for the others.

    P(word) = y(word) for a frequent word, y(rare) / C for each of the C rare words of the text, so that
    probabilities of words, not of classes, are compared. The class has id 0.

    Attributes:
        frequent: id of each frequent word, from 1.
        rare: the C rare words.
    """

    frequent: dict[str, int]
    rare: frozenset[str]

    @classmethod
    def of(cls, words: Sequence[str], least: int) -> Vocabulary:
        """Count words; those seen fewer than `least` times are rare. Raises ValueError when that leaves none."""
        counts = Counter(words)
        frequent = [word for word, count in counts.most_common() if count >= least]
        rare = frozenset(word for word, count in counts.items() if count < least)
        if not frequent or not rare:
            which = "frequent" if not frequent else "rare"
            raise ValueError(f"with least={least} no word of {len(counts)} is {which}; choose another threshold")
        return cls({word: index for index, word in enumerate(frequent, 1)}, rare)

    @property
    def size(self) -> int:
        """How many ids there are, the class of rare words included."""
        return len(self.frequent) + 1

    def encode(self, words: Sequence[str]) -> Int[Tensor, " words"]:
        """Ids; words that are rare or were never seen get 0."""
        return torch.tensor([self.frequent.get(word, 0) for word in words])

    def known(self, words: Sequence[str]) -> Tensor:
        """Which words the text had, frequent or rare: of the others no model can give a probability."""
        return torch.tensor([word in self.frequent or word in self.rare for word in words])

    def of_words(
        self, log_probabilities: Float[Tensor, " words"], ids: Int[Tensor, " words"]
    ) -> Float[Tensor, " words"]:
        """Turn log y(id) into log P(word): the class of rare words shares its probability equally."""
        return log_probabilities - math.log(len(self.rare)) * (ids == 0).to(log_probabilities.dtype)
