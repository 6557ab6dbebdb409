"""Which keys each query sees, as one value: what attention hands to a backend, which decides how to compute it.

A mask is a description first (causal, a window, segments). The dense tensor, or the pieces, are made from it when a
backend asks, and once for all layers of a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.nn.attention.cache import KeyValueCache
from paperworks.nn.attention.pieces import Piece, band, documents
from paperworks.nn.placement import Placement


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask:
    """Which of `keys` keys each of `queries` queries sees.

    Attributes:
        queries, keys: how many there are; start: the first query's place in the sequence.
        device: where the tensors are.
        causal: whether a query sees no key after itself.
        window: a query sees keys fewer than this many places before it (and, where not causal, after it); None: all.
        order: int64 (keys,), the place of each key in the sequence; None means 0, 1, 2 ...
        segments: int64 (batch, queries) and key_segments (batch, keys): a query sees keys of its own segment.
        seen: bool, broadcasts to (batch, 1, queries, keys), takes the place of causality and window, where given.
        bias: float, broadcasts to (batch, heads, queries, keys), added to the scores; None for none.
    """

    queries: int
    keys: int
    device: torch.device
    start: int = 0
    causal: bool = False
    window: int | None = None
    order: Int[Tensor, " keys"] | None = None
    segments: Int[Tensor, "batch queries"] | None = None
    key_segments: Int[Tensor, "batch keys"] | None = None
    seen: Bool[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def self_contained(self) -> bool:
        """Whether queries and keys are the same tokens, from the first on."""
        return self.start == 0 and self.order is None and self.queries == self.keys

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key."""
        return not self.causal and self.window is None and self.segments is None and self.seen is None

    @property
    def is_plain_causal(self) -> bool:
        """Whether the triangle is all there is to it, and no bias."""
        plain = self.segments is None and self.seen is None and self.bias is None
        return self.causal and plain and self.self_contained and (self.window is None or self.keys <= self.window)

    def places(self) -> Int[Tensor, " keys"]:
        """The place of each key in the sequence."""
        return torch.arange(self.keys, device=self.device) if self.order is None else self.order

    def distance(self) -> Int[Tensor, "queries keys"]:
        """Place of the key minus place of the query."""
        if "distance" not in self._made:
            first = torch.arange(self.start, self.start + self.queries, device=self.device)
            self._made["distance"] = self.places() - first[:, None]
        out: Tensor = self._made["distance"]
        return out

    def visible(self) -> Bool[Tensor, "rows 1 queries keys"] | None:
        """What is seen as a tensor, rows 1 where all rows are alike; None where everything is."""
        if self.hides_nothing:
            return None
        if "visible" not in self._made:
            self._made["visible"] = self._visible()
        out: Bool[Tensor, "rows 1 queries keys"] | None = self._made["visible"]
        return out

    def _visible(self) -> Tensor:
        if self.seen is not None:
            mask = self.seen
        elif self.causal or self.window is not None:
            distance = self.distance()
            mask = distance <= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                mask = mask & (distance > -self.window)
                mask = mask if self.causal else mask & (distance < self.window)
            mask = mask[None, None]
        else:
            mask = torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool, device=self.device)
        if self.segments is not None:
            assert self.key_segments is not None
            mask = mask & (self.segments[:, None, :, None] == self.key_segments[:, None, None, :])
        return mask

    def dense(self) -> Tensor | None:
        """One tensor for a kernel: bool, True where a key is seen, or numbers to add (-inf: hidden), or None."""
        visible = self.visible()
        if self.bias is None or visible is None:
            return visible if self.bias is None else self.bias
        if "dense" not in self._made:
            self._made["dense"] = self.bias.masked_fill(~visible, -math.inf)
        out: Tensor | None = self._made["dense"]
        return out

    def pieces(self) -> tuple[Piece, ...] | None:
        """Dense pieces that leave out what is hidden: documents of packed rows, bands of a window; None where none are.

        Finding where documents end reads the segments, which on a GPU waits for the device.
        """
        if not self.self_contained or self.seen is not None or self.bias is not None:
            return None
        if "pieces" not in self._made:
            if self.segments is not None and (self.causal or self.window is None):
                self._made["pieces"] = documents(self.segments, causal=self.causal, window=self.window)
            elif self.segments is None and self.window is not None and self.causal:
                self._made["pieces"] = tuple(band(self.queries, self.window, self.device))
            else:
                self._made["pieces"] = None
        out: tuple[Piece, ...] | None = self._made["pieces"]
        return out

    def edges(self, rows: int) -> Int[Tensor, " documents_and_one"] | None:
        """Where documents begin in the rows laid end to end, and the end of the last, int32; None where that cannot be.

        A document is a run of one segment in one row; where a segment goes on after another one, there is no such
        division. Waits for the device, once for all layers of a call.
        """
        if self.segments is None or not self.self_contained or self.seen is not None or self.bias is not None:
            return None
        if "edges" not in self._made:
            segments = self.segments.expand(rows, -1)
            begins = torch.ones_like(segments, dtype=torch.bool)
            begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
            row = torch.arange(rows, device=segments.device)[:, None].expand_as(segments)
            names = torch.stack((row[begins], segments[begins]), 1)
            starts = begins.flatten().nonzero()[:, 0]
            ends = torch.cat((starts, starts.new_full((1,), segments.numel()))).to(torch.int32)
            self._made["edges"] = ends if len(torch.unique(names, dim=0)) == len(names) else None
        out: Int[Tensor, " documents_and_one"] | None = self._made["edges"]
        return out

    def biased(self, bias: Float[Tensor, "..."]) -> Mask:
        """The same with numbers to add to the scores."""
        return replace(self, bias=bias, _made={k: v for k, v in self._made.items() if k in ("distance", "visible")})


def mask_of(placement: Placement, cache: KeyValueCache | None, causal: bool, window: int | None) -> Mask:
    """What the tokens of this call see of themselves and of the cache; made once for all layers that are alike."""
    rolling = cache.capacity if cache is not None and cache.rolling else None
    key = ("mask", causal, window, rolling, cache is None)
    if key not in placement.memo:
        placement.memo[key] = _mask(placement, cache, causal, window)
    out: Mask = placement.memo[key]
    return out


def _mask(placement: Placement, cache: KeyValueCache | None, causal: bool, window: int | None) -> Mask:
    start, time, device = placement.start, placement.time, placement.device
    rolled = cache is not None and cache.rolling and start > 0  # before, slots stand in the order of the sequence
    order = cache.visible_order(start, time, device) if cache is not None and rolled else None
    keys = start + time if order is None else len(order)
    plain = Mask(queries=time, keys=keys, device=device, start=start, order=order)
    history = placement.history
    seen = placement.visible(plain.places())
    if history is None and seen is None and time == 1 and causal and (window is None or keys <= window):
        return plain  # the newest token sees all there is: a rolling cache holds no more than the window
    return replace(
        plain,
        causal=causal and seen is None,
        window=window,
        segments=placement.segments,
        key_segments=None if history is None else history if order is None else history[:, order],
        seen=None if seen is None else seen[None, None],
        _made={},
    )
