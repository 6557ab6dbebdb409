"""Byte-pair merges of one piece of text, by rank: the lowest-ranked pair first, until none is left."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import pairwise

LONG = 128  # bytes from which the heap is faster than looking at all pairs again


def merge(piece: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The tokens of a piece: again and again the pair of neighbours with the lowest rank, joined, becomes one.

    Of equal pairs the leftmost is first. Every single byte must have a rank. A piece of n bytes takes O(n log n).
    """
    return merge_by_search(piece, ranks) if len(piece) < LONG else merge_by_heap(piece, ranks)


def merge_by_search(piece: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The same by looking at all pairs before every merge: O(n^2), and the plain version the heap is tested against."""
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 1:
        candidates = [ranks.get(first + second) for first, second in pairwise(parts)]
        known = [rank for rank in candidates if rank is not None]
        if not known:
            break
        at = candidates.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merge_by_heap(piece: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The same with the pairs in a heap and the parts in a linked list, for pieces without an end."""
    size = len(piece)
    ends = list(range(1, size + 1))  # where the part that begins here ends; 0 once it is part of another
    before = list(range(-1, size - 1))
    heap: list[tuple[int, int, int]] = []  # rank, start of the pair, its end: an entry whose end has moved is old

    def offer(start: int) -> None:
        middle = ends[start]
        if middle < size:
            rank = ranks.get(piece[start : ends[middle]])
            if rank is not None:
                heapq.heappush(heap, (rank, start, ends[middle]))

    for start in range(size - 1):
        rank = ranks.get(piece[start : start + 2])
        if rank is not None:
            heap.append((rank, start, start + 2))
    heapq.heapify(heap)
    while heap:
        _, start, end = heapq.heappop(heap)
        middle = ends[start]
        if not middle or middle == size or ends[middle] != end:
            continue
        ends[start], ends[middle] = end, 0
        if end < size:
            before[end] = start
        offer(start)
        if before[start] >= 0:
            offer(before[start])
    parts, start = [], 0
    while start < size:
        parts.append(piece[start : ends[start]])
        start = ends[start]
    return parts
