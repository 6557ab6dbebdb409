"""Huffman's tree over a vocabulary: the binary decisions that spell a word (hierarchical softmax)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TreePaths:
    """Every word's way from the root to its leaf, padded to the longest.

    Attributes:
        nodes: the inner nodes passed, 0 .. words - 2, the root is the last one; 0 where padded.
        codes: at each of them whether the way turns right (code 1).
        lengths: how many there are.
    """

    nodes: Int[Tensor, "words longest"]
    codes: Bool[Tensor, "words longest"]
    lengths: Int[Tensor, " words"]

    @property
    def passed(self) -> Bool[Tensor, "words longest"]:
        """True where a node is on the way, False where it is padding."""
        return torch.arange(self.nodes.shape[1]) < self.lengths[:, None]

    def code(self, word: int) -> str:
        """A word's code as it is written: "0110"."""
        return "".join("1" if bit else "0" for bit in self.codes[word, : self.lengths[word]].tolist())


def huffman_paths(counts: Sequence[int]) -> TreePaths:
    """Build the tree whose expected depth is least: the two rarest subtrees become one, again and again (Huffman 1952).

    Of equally frequent subtrees the one built first is taken first, so that one list of counts gives one tree; the
    rarer of the two is the left child, with code 0.

    Raises:
        ValueError: for fewer than two words, or a count that is not positive.
    """
    if len(counts) < 2:
        raise ValueError(f"a tree needs at least two words, got {len(counts)}")
    if min(counts) <= 0:
        raise ValueError(f"every word must occur: the count of word {list(counts).index(min(counts))} is {min(counts)}")
    words = len(counts)
    heap = [(count, word) for word, count in enumerate(counts)]
    heapq.heapify(heap)
    parent, right = [0] * (2 * words - 1), [False] * (2 * words - 1)
    for made in range(words, 2 * words - 1):
        first, left = heapq.heappop(heap)
        second, other = heapq.heappop(heap)
        parent[left] = parent[other] = made
        right[other] = True
        heapq.heappush(heap, (first + second, made))
    ways = [_way(word, parent, right, words) for word in range(words)]
    longest = max(map(len, ways))
    nodes = torch.zeros(words, longest, dtype=torch.int64)
    codes = torch.zeros(words, longest, dtype=torch.bool)
    for word, way in enumerate(ways):
        nodes[word, : len(way)] = torch.tensor([node for node, _ in way])
        codes[word, : len(way)] = torch.tensor([bit for _, bit in way])
    return TreePaths(nodes, codes, torch.tensor([len(way) for way in ways]))


def _way(word: int, parent: list[int], right: list[bool], words: int) -> list[tuple[int, bool]]:
    """(inner node, turns right) from the root down."""
    way, at = [], word
    while at != len(parent) - 1:
        way.append((parent[at] - words, right[at]))
        at = parent[at]
    return way[::-1]
