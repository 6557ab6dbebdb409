"""Phrases: neighbours that stand together more often than their own counts explain become one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Phrases:
    """score(a, b) = (count(ab) - discount) / (count(a) count(b)) * vocabulary (Mikolov et al. 2013, equation 6).

    The paper's score is divided by nothing and multiplied by nothing; like the published program this one multiplies by
    the number of distinct words, so that one threshold does for corpora of any size.

    Attributes:
        joined: every pair whose score exceeded the threshold, and its score.
        delimiter: what stands between the two in the token they become.
    """

    joined: dict[tuple[str, str], float]
    delimiter: str = "_"

    @classmethod
    def find(
        cls,
        sentences: Iterable[Sequence[str]],
        *,
        discount: int = 5,
        threshold: float = 10.0,
        delimiter: str = "_",
    ) -> Phrases:
        """Count words and neighbouring pairs, and keep the pairs that score above the threshold.

        Args:
            sentences: pairs do not reach from one to the next.
            discount: the paper's delta, taken from every pair's count so that pairs of rare words do not win; it is
                also the least count a word may have.
            threshold: a higher one finds fewer phrases. For longer phrases call `find` again on what `join` returns, 2
                to 4 times, with a lower threshold each time.
            delimiter: what to put between.

        Raises:
            ValueError: for a negative discount or threshold.
        """
        if discount < 0 or threshold < 0:
            raise ValueError(f"discount and threshold are counts and scores, 0 or more; got {discount} and {threshold}")
        words: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        for sentence in sentences:
            words.update(sentence)
            pairs.update(pairwise(sentence))
        size = len(words)
        scored = {
            (a, b): (count - discount) / (words[a] * words[b]) * size
            for (a, b), count in pairs.items()
            if min(words[a], words[b]) >= discount
        }
        return cls({pair: score for pair, score in scored.items() if score > threshold}, delimiter)

    def join(self, sentence: Sequence[str]) -> list[str]:
        """The sentence with its phrases as single tokens; from the left, and no word belongs to two."""
        written, at = [], 0
        while at < len(sentence):
            pair = tuple(sentence[at : at + 2])
            if len(pair) == 2 and pair in self.joined:
                written.append(self.delimiter.join(pair))
                at += 2
            else:
                written.append(sentence[at])
                at += 1
        return written
