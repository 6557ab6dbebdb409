"""Where tokens stand: the one argument that every part receives beside its input, and the cache that carries it on.

    model(tokens)                                             one sequence a row, from its beginning
    model(tokens, Placement(segments=segments))               documents packed in one row, 0 for padding
    model(tokens, Placement(cache=model.new_cache(...)))      what came before is in the cache

The caller says what is not the default; `Placement.resolve` completes it for the tokens of one call. A paper that needs
to say more makes a subclass (`nn.position.paired.TargetPlacement`), whose fields reach every part in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

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
        """The memory held, in bytes."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises `ValueError` where what is held cannot be taken apart."""
        raise ValueError(
            f"{type(self).__name__} cannot be truncated: it keeps a summary of all tokens (or only the last ones), not "
            "each of them; use attention without a window for what has to take tokens back"
        )


@dataclass(kw_only=True)
class Placement:
    """Where the tokens of one forward call stand.

    Given by the caller:
        positions: int64 (batch or 1, time), what position encodings read; by default they count on from the cache,
            from 0 at the start of each segment.
        segments: int64 (batch or 1, time); tokens see each other only inside one segment (a document of a packed row),
            0 is padding. By default all tokens belong to the segment that the cache ended with.
        cache: what came before, advanced past these tokens: the model's `Cache`, and inside a block the mixer's own.
        context: (batch, other time, dim), what cross-attending mixers read; with a cache, needed once.
        context_segments: int64 (batch, other time), 0 is padding of the context; in packed rows a token reads what has
            its own segment.

    Known after `resolve`:
        start: tokens in the cache before these; time: tokens of this call.
        history: int64 (batch, start + time) or None, the segments of all tokens so far, these included.
        horizon: the length the sequence will have at most; encodings that depend on the length (dynamic NTK, LongRoPE)
            read it, so that all keys of one cache are rotated alike.
        default_positions: whether positions simply count on.
        memo: tables that layers share within this call (masks).
        tables: tables that outlive the call when there is a cache (cosines and sines).
    """

    positions: Int[Tensor, "batch time"] | None = None
    segments: Int[Tensor, "batch time"] | None = None
    cache: Any = None
    context: Tensor | None = None
    context_segments: Int[Tensor, "batch other"] | None = None
    start: int = field(default=0, init=False)
    time: int = field(default=0, init=False)
    history: Int[Tensor, "batch seen"] | None = field(default=None, init=False)
    horizon: int = field(default=0, init=False)
    default_positions: bool = field(default=True, init=False)
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    # Whether mixers other than attention can obey this placement; a subclass that changes what is seen says no.
    attention_only = False

    @staticmethod
    def from_batch(batch: Mapping[str, Any]) -> Placement | None:
        """The placement that a batch's tensors describe ("positions", "segments", and what subclasses add), or None.

        Of the known kinds of placement, the first that has all the fields found.
        """
        kinds: list[type[Placement]] = [Placement, *_subclasses(Placement)]
        names = {each.name for kind in kinds for each in fields(kind) if each.init} - _NOT_IN_BATCHES
        found = {name: batch[name] for name in names if batch.get(name) is not None}
        if not found:
            return None
        return next(kind for kind in kinds if found.keys() <= {each.name for each in fields(kind)})(**found)

    def resolve(self, batch: int, time: int, device: torch.device) -> Self:
        """Say where `time` new tokens of `batch` rows stand, and advance the cache past them.

        Raises:
            ValueError: when the cache is too short, or a shape is wrong; the cache is as before then.
        """
        cache: Cache | None = self.cache
        start = cache.length if cache is not None else 0
        if cache is not None and start + time > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.capacity} tokens and {start} are in it: no room for {time} more; "
                f"open it with new_cache(batch, capacity={start + time}) or more"
            )
        self.check(batch, time)
        here = self.copy()
        here.start, here.time, here.horizon = start, time, cache.capacity if cache is not None else time
        segments = None if self.segments is None else self.segments.expand(batch, time)
        here.history = _history(batch, time, start, device, segments, cache)
        here.segments = None if here.history is None else here.history[:, start:]
        if self.positions is None:
            counted = here.history is None and (cache is None or cache._next is None)
            here.positions, here.default_positions = _count_positions(start, time, device, here.history, cache), counted
        else:
            here.default_positions = False
            if cache is not None:
                cache._next = (self.positions[:, -1] + 1).expand(batch).clone()
        if cache is not None:
            cache.length = start + time
            here.tables = cache.tables
        return here

    def check(self, batch: int, time: int) -> None:
        """Raise `ValueError` where a shape does not fit `batch` rows of `time` tokens."""
        for name in ("positions", "segments"):
            require_token_shape(name, getattr(self, name), batch, time)
        context, segments = self.context, self.context_segments
        if segments is not None and (context is None or segments.shape != context.shape[:2]):
            shape = None if context is None else tuple(context.shape)
            raise ValueError(
                f"context_segments {tuple(segments.shape)} must have the first two sizes of context {shape}"
            )

    def require(self, model: Any) -> None:
        """Raise `ValueError` where the model has no part that reads what this placement says."""

    def copy(self) -> Self:
        """The same placement as another object; tensors, memo and tables are shared."""
        twin = type(self)(**{each.name: getattr(self, each.name) for each in fields(self) if each.init})
        for each in fields(self):
            if not each.init:
                setattr(twin, each.name, getattr(self, each.name))
        return twin

    def at(self, cache: Any) -> Self:
        """This placement as the part that owns `cache` sees it; memo and tables stay shared."""
        if cache is self.cache:
            return self
        twin = self.copy()
        twin.cache = cache
        return twin

    def visible(self, keys: Int[Tensor, " keys"]) -> Bool[Tensor, "time keys"] | None:
        """Which keys, given by their order in the sequence, each token may see; None for what attention does anyway.

        It takes the place of causality; segments hide what they hide in any case. See `attention_only`.
        """
        return None

    @property
    def device(self) -> torch.device:
        """Where the tokens are, once resolved."""
        assert self.positions is not None
        return self.positions.device

    def begins(self) -> Bool[Tensor, "batch time"] | None:
        """Where a segment begins, so that a recurrent mixer starts there from nothing.

        None: nowhere that needs saying, for the tokens go on with what the cache holds (at the start: nothing).
        """
        if self.history is None:
            return None
        if "begins" not in self.memo:
            before = functional.pad(self.history[:, :-1], (1, 0), value=-1)
            self.memo["begins"] = (self.history != before)[:, self.start :]
        out: Bool[Tensor, "batch time"] | None = self.memo["begins"]
        return out


_NOT_IN_BATCHES = {"cache", "context", "context_segments"}


def _subclasses(kind: type[Placement]) -> list[type[Placement]]:
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]


def require_token_shape(name: str, tensor: Tensor | None, batch: int, time: int) -> None:
    """Raise `ValueError` unless the tensor is None or (batch or 1, time)."""
    if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != time or tensor.shape[0] not in (1, batch)):
        raise ValueError(f"{name} must have shape ({batch}, {time}) like the tokens, got {tuple(tensor.shape)}")


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
        """The memory held by all layers, in bytes."""
        return sum(layer.bytes() for layer in self.layers)


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
    """Number of tokens of its segment (a run of one id) before each token, (batch, seen)."""
    order = torch.arange(history.shape[1], device=history.device).expand_as(history)
    begins = torch.ones_like(history, dtype=torch.bool)
    begins[:, 1:] = history[:, 1:] != history[:, :-1]
    return order - torch.where(begins, order, 0).cummax(dim=1).values
