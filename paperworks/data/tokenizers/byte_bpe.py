"""Learning byte-level BPE: merges of bytes, the most frequent pair first (Wang et al. 2019, arXiv:1909.03341)."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

Pair = tuple[int, int]

# Single bytes in the order of GPT-2's vocabulary: those that print, then the others.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_ORDER = (*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE))


def train_ranks(pieces: Iterable[bytes], vocab_size: int, *, min_frequency: int = 2) -> dict[bytes, int]:
    """Learn a vocabulary: the 256 bytes, then again and again the pair of tokens most often side by side as one token.

    Pairs are counted inside pieces only. Of equally frequent pairs the one with the smallest ranks is taken, so one
    text gives one vocabulary. After a merge only the pieces that hold its pair are looked at again.

    Args:
        pieces: words as bytes, however often each occurs: `RankTokenizer.pieces` of texts, encoded.
        vocab_size: tokens wanted, the bytes included; fewer come when no pair is frequent enough.
        min_frequency: pairs that occur less often are not merged.

    Returns:
        token to rank; ranks are ids, single bytes first in `BYTE_ORDER`.

    Raises:
        ValueError: for a vocabulary that has no place for the bytes, or a frequency below 1.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one for every byte, got {vocab_size}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    tokens = list(ranks)
    counted = Counter(pieces)
    corpus = _Pairs([[ranks[piece[at : at + 1]] for at in range(len(piece))] for piece in counted], [*counted.values()])
    while len(ranks) < vocab_size:
        pair, count = corpus.most_frequent()
        if count < min_frequency:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # another pair may have spelled it before
            ranks[token] = len(tokens)
            tokens.append(token)
        corpus.merge(pair, ranks[token])
    return ranks


class _Pairs:
    """Words as lists of ids, how often each pair of neighbours occurs in them, and in which words."""

    def __init__(self, words: list[list[int]], counts: list[int]) -> None:
        self.words, self.counts = words, counts
        self.totals: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for number, word in enumerate(words):
            for pair in pairwise(word):
                self.totals[pair] += counts[number]
                self.where[pair].add(number)
        self.heap = [(-total, pair) for pair, total in self.totals.items()]
        heapq.heapify(self.heap)

    def most_frequent(self) -> tuple[Pair, int]:
        """The most frequent pair, the smallest of equals; a count of 0 when there is none."""
        while self.heap:
            total, pair = self.heap[0]
            if -total == self.totals[pair] > 0:
                return pair, -total
            heapq.heappop(self.heap)  # an entry from before a merge
        return (0, 0), 0

    def merge(self, pair: Pair, made: int) -> None:
        """Let `made` stand where the pair stood, and count again in the words that held it."""
        changed: set[Pair] = set()
        for number in self.where.pop(pair):
            old, count = self.words[number], self.counts[number]
            new = _joined(old, pair, made)
            before, after = Counter(pairwise(old)), Counter(pairwise(new))
            for other in before.keys() | after.keys():
                difference = after[other] - before[other]
                if difference:
                    self.totals[other] += count * difference
                    changed.add(other)
                if other in after:
                    self.where[other].add(number)
                elif other != pair:
                    self.where[other].discard(number)
            self.words[number] = new
        for other in changed:
            if self.totals[other] > 0:
                heapq.heappush(self.heap, (-self.totals[other], other))
            else:
                del self.totals[other]


def _joined(word: list[int], pair: Pair, made: int) -> list[int]:
    """The word with the pair as one id, from the left."""
    written, at = [], 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            written.append(made)
            at += 2
        else:
            written.append(word[at])
            at += 1
    return written
