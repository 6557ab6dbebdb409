"""Where tokens stand: the one argument every mixer receives beside its input, and the cache that carries it on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional


class MixerCache(ABC):
    """What one mixer remembers between calls. Every tensor in it has the batch as its first dimension."""

    @abstractmethod
    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch, in that order (beam search, dropping finished rows)."""

    @abstractmethod
    def bytes(self) -> int:
        """Return the memory held, in bytes."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises `ValueError` where what is held cannot be taken apart."""
        raise ValueError(
            f"{type(self).__name__} cannot be truncated: it keeps a summary of all tokens (or only the last ones), not "
            "each of them; use attention without a window for what has to take tokens back"
        )


@dataclass(kw_only=True)
class Stream:
    """Where the tokens of one forward call stand.

    Attributes:
        start: how many tokens the cache has seen before these.
        time: how many tokens this call brings.
        positions: int64 (batch or 1, time); what position encodings read.
        segments: int64 (batch, time) or None; tokens see each other only inside one segment. 0 is padding.
        history: int64 (batch, start + time) or None; the segments of all tokens so far, these included.
        horizon: the length this stream will have at most; encodings that depend on the length (dynamic NTK,
            LongRoPE) read it, so that all keys of one cache are rotated alike.
        cache: the cache of the mixer that reads this stream, or None.
        asked: int64 (batch or 1, time) or None; the position whose token each of these is to predict, where that is not
            simply the next one (`PairedPositions`, sigma-GPT).
        among: bool (time, time) or None; which tokens of this call (rows) see which others of it (columns), instead of
            the earlier ones. All see what the cache holds. Attention only.
        context: (batch, other time, dim) or None; what a cross-attending mixer reads.
        context_segments: int64 (batch, other time) or None; 0 is padding of the context, and in packed rows a token
            reads what has its own segment.
        memo: tables that layers share within this call (masks).
        tables: tables that outlive the call when there is a cache (cosines and sines).
    """

    start: int
    time: int
    positions: Int[Tensor, "batch time"]
    segments: Int[Tensor, "batch time"] | None = None
    history: Int[Tensor, "batch seen"] | None = None
    horizon: int = 0
    default_positions: bool = True
    cache: MixerCache | None = None
    asked: Int[Tensor, "batch time"] | None = None
    among: Bool[Tensor, "time time"] | None = None
    context: Tensor | None = None
    context_segments: Int[Tensor, "batch other"] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    tables: dict[Any, Any] = field(default_factory=dict)

    def at(self, cache: MixerCache | None) -> "Stream":
        """Return this stream as the mixer that owns `cache` sees it; memo and tables stay shared."""
        return self if cache is self.cache else Stream(**{**vars(self), "cache": cache})

    def begins(self) -> Bool[Tensor, "batch time"] | None:
        """Return where a segment begins, so that a recurrent mixer starts there from nothing.

        None: nowhere that needs saying, for the tokens go on with what the cache holds (at the start: nothing).
        """
        if self.history is None:
            return None
        if "begins" not in self.memo:
            before = functional.pad(self.history[:, :-1], (1, 0), value=-1)
            self.memo["begins"] = (self.history != before)[:, self.start :]
        return self.memo["begins"]


class Cache:
    """The caches of a model's mixers, and how far the sequence has come.

    `Cache([mixer.new_cache(...) for mixer in mixers], capacity)`; models make theirs with `new_cache`.
    """

    def __init__(self, layers: list[MixerCache], capacity: int) -> None:
        self.layers = layers
        self.capacity = capacity
        self.length = 0
        self.tables: dict[Any, Any] = {}
        self._history: Tensor | None = None  # (batch, capacity) segments by order; None: one document everywhere
        self._next: Tensor | None = None  # (batch,) position of the next token; None: `length` for every row

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch, in that order."""
        for layer in self.layers:
            layer.reorder(rows)
        if self._history is not None:
            self._history = self._history.index_select(0, rows)
        if self._next is not None:
            self._next = self._next.index_select(0, rows)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, so that others can take their place.

        Raises `ValueError` when there are not so many, or when a layer cannot forget (recurrent ones, rolling windows).
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} tokens and cannot be cut to {length}")
        for layer in self.layers:
            layer.truncate(length)
        if self._next is not None:
            self._next = self._next - (self.length - length)
        self.length = length

    def bytes(self) -> int:
        """Return the memory held by all layers, in bytes."""
        return sum(layer.bytes() for layer in self.layers)


def open_stream(
    batch: int,
    time: int,
    device: torch.device,
    *,
    positions: Int[Tensor, "batch time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    cache: Cache | None = None,
    asked: Int[Tensor, "batch time"] | None = None,
    among: Bool[Tensor, "time time"] | None = None,
    context: Tensor | None = None,
    context_segments: Int[Tensor, "batch other"] | None = None,
) -> Stream:
    """Say where `time` new tokens stand, and advance `cache` past them.

    Without `positions` they count on from the cache, from 0 at the start of each segment. Without `segments` the
    tokens belong to the segment that the cache ended with. Raises `ValueError` when the cache is too short or a
    shape is wrong.
    """
    start = cache.length if cache is not None else 0
    if cache is not None and start + time > cache.capacity:
        raise ValueError(
            f"the cache holds {cache.capacity} tokens and {start} are in it: no room for {time} more; "
            f"open it with new_cache(batch, capacity={start + time}) or more"
        )
    for name, tensor in (("positions", positions), ("segments", segments), ("asked", asked)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != time or tensor.shape[0] not in (1, batch)):
            raise ValueError(f"{name} must have shape ({batch}, {time}) like the tokens, got {tuple(tensor.shape)}")
    if among is not None and (among.shape != (time, time) or among.dtype != torch.bool):
        raise ValueError(f"among must be bool ({time}, {time}), got {among.dtype} {tuple(among.shape)}")
    if context_segments is not None and (context is None or context_segments.shape != context.shape[:2]):
        shape = None if context is None else tuple(context.shape)
        raise ValueError(
            f"context_segments {tuple(context_segments.shape)} must have the first two sizes of context {shape}"
        )
    if segments is not None:
        segments = segments.expand(batch, time)
    history = _history(batch, time, start, device, segments, cache)
    default = positions is None
    if positions is None:
        positions = _count_positions(start, time, device, history, cache)
    else:
        if cache is not None:
            cache._next = (positions[:, -1] + 1).expand(batch).clone()
        default = False
    if cache is not None:
        cache.length = start + time
    return Stream(
        start=start,
        time=time,
        positions=positions,
        segments=None if history is None else history[:, start:],
        history=history,
        horizon=cache.capacity if cache is not None else time,
        default_positions=default and history is None and (cache is None or cache._next is None),
        asked=asked,
        among=among,
        context=context,
        context_segments=context_segments,
        tables=cache.tables if cache is not None else {},
    )


def _history(
    batch: int, time: int, start: int, device: torch.device, segments: Tensor | None, cache: Cache | None
) -> Tensor | None:
    if cache is None:
        return segments
    if cache._history is None:
        if segments is None:
            return None
        cache._history = torch.ones(batch, cache.capacity, dtype=torch.int64, device=device)
    end = start + time
    if segments is not None:
        cache._history[:, start:end] = segments
    else:
        cache._history[:, start:end] = cache._history[:, start - 1 : start] if start else 1
    return cache._history[:, :end]


def _count_positions(
    start: int, time: int, device: torch.device, history: Tensor | None, cache: Cache | None
) -> Tensor:
    if history is None:
        if cache is not None and cache._next is not None:  # earlier tokens had positions of their own: count on
            positions = cache._next[:, None] + torch.arange(time, device=device)
            cache._next = cache._next + time
            return positions
        return torch.arange(start, start + time, device=device)[None]
    return places_in_segments(history)[:, start:]


def places_in_segments(history: Int[Tensor, "batch seen"]) -> Int[Tensor, "batch seen"]:
    """Return how many tokens of its segment (a run of one id) stand before each token."""
    order = torch.arange(history.shape[1], device=history.device).expand_as(history)
    begins = torch.ones_like(history, dtype=torch.bool)
    begins[:, 1:] = history[:, 1:] != history[:, :-1]
    return order - torch.where(begins, order, 0).cummax(dim=1).values
