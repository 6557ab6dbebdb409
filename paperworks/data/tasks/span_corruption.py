"""Span corruption, T5's pre-training data (Raffel et al. 2019, arXiv:1910.10683, Section 3.1.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Corrupted(NamedTuple):
    """What is read, with each lost span as one sentinel, and what is to be written: sentinels, each before its span."""

    source: Int[Tensor, " source"]
    target: Int[Tensor, " target"]


def random_spans(
    length: int, *, share: float = 0.15, mean_span: float = 3.0, generator: torch.Generator | None = None
) -> Bool[Tensor, " length"]:
    """Which tokens are lost: round(length * share) of them, in spans of `mean_span` on average.

    Kept and lost stretches are random partitions of their tokens into as many parts, in turn, kept ones first.

    Raises ValueError for a length or shares that leave nothing to lose or to keep.
    """
    if not 0 < share < 1 or mean_span < 1:
        raise ValueError(f"share must be in (0, 1) and mean_span at least 1, got {share} and {mean_span}")
    if length < 2:
        raise ValueError(f"a text of {length} tokens has nothing to lose and keep: at least 2 are needed")
    lost = min(max(round(length * share), 1), length - 1)
    spans = min(max(round(lost / mean_span), 1), lost, length - lost)
    parts = torch.stack((_partition(length - lost, spans, generator), _partition(lost, spans, generator)), 1).flatten()
    kinds = torch.tensor([False, True]).repeat(spans)
    return kinds.repeat_interleave(parts)


def _partition(total: int, parts: int, generator: torch.Generator | None) -> Int[Tensor, " parts"]:
    """Cut a total into parts of at least one, every way equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([total])))
    return bounds.diff()


def corrupt_spans(
    tokens: Int[Tensor, " length"], lost: Bool[Tensor, " length"], *, first_sentinel: int, end: int | None = 1
) -> Corrupted:
    """Replace each lost span by a sentinel: `first_sentinel`, then one less each time.

    The target ends with one more sentinel; both end with the token `end`, if any.

    Raises ValueError when shapes differ, or sentinels reach into the tokens.
    """
    if tokens.dim() != 1 or lost.shape != tokens.shape:
        raise ValueError(f"tokens and lost must be of one length, got {tuple(tokens.shape)} and {tuple(lost.shape)}")
    begins = lost & ~torch.nn.functional.pad(lost[:-1], (1, 0))
    count = int(begins.sum())
    if count and first_sentinel - count <= int(tokens.max()):
        raise ValueError(
            f"{count + 1} sentinels from {first_sentinel} down reach the largest token, {int(tokens.max())}: "
            "raise first_sentinel, or lose fewer spans"
        )
    sentinels = first_sentinel + 1 - begins.cumsum(0)
    source = torch.where(begins, sentinels, tokens)[~lost | begins]
    written = torch.stack((torch.where(begins, sentinels, -1), tokens), 1)[lost].flatten()
    target = torch.cat((written[written >= 0], tokens.new_tensor([first_sentinel - count])))
    if end is not None:
        closing = tokens.new_tensor([end])
        source, target = torch.cat((source, closing)), torch.cat((target, closing))
    return Corrupted(source, target)


def restored(source: Int[Tensor, " source"], target: Int[Tensor, " target"], first_sentinel: int) -> list[int]:
    """The text that a source and its target stand for, without sentinels."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in target.tolist():
        if token == first_sentinel - len(spans):  # sentinels come in order
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    found: list[int] = []
    for token in source.tolist():
        found += spans.get(token, [token])
    return found
