"""Attention (Vaswani et al. 2017), grouped-query (Ainslie et al. 2023, arXiv:2305.13245), with or without a window."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.linear import residual_output
from paperworks.nn.attention.mask import Piece, Visibility, band, by_piece, documents, worthwhile
from paperworks.nn.mixer import Mixer
from paperworks.nn.norm import Norm
from paperworks.nn.placement import MixerCache, Stream
from paperworks.nn.position.relative import RelativeModule, RelativePosition
from paperworks.nn.position.rotary import RoPE
from paperworks.nn.tap import Tap


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """softmax(query key^T * scale) value, in several heads, each token seeing itself and earlier ones of its segment.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads, each shared by heads / kv_heads consecutive query heads; None means `heads`, 1 is
            multi-query attention.
        head_dim: channels of a head; None means dim / heads.
        bias: whether query, key and value have one; `output_bias` is the output's, None means the same.
        window: each token sees this many tokens, itself included; None means all.
        causal: whether later tokens are hidden.
        position: rotary positions, relative ones (`ALiBi`, `RelativeBuckets`, `RelativeVectors`), or None.
        qk_norm: a norm on each head's queries and keys, before rotation.
        soft_cap: scores become cap * tanh(score / cap) (Gemma 2).
        scale: what scores are multiplied by; None means head_dim^-0.5.
        dropout: the share of attention weights dropped in training.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False
    output_bias: bool | None = None
    window: int | None = None
    causal: bool = True
    position: RoPE | RelativePosition | None = None
    qk_norm: Norm | None = None
    soft_cap: float | None = None
    scale: float | None = None
    dropout: float = 0.0

    def validate(self) -> None:
        """Check that heads divide and sizes are positive."""
        if self.heads < 1:
            raise ValueError(f"Attention.heads must be at least 1, got {self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            divisors = [count for count in range(1, self.heads + 1) if self.heads % count == 0]
            raise ValueError(
                f"Attention.kv_heads must divide heads ({self.heads}), got {self.kv_heads}; possible: {divisors}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"Attention.window must be at least 1 (a token sees itself), got {self.window}")
        if self.window is not None and not self.causal:
            raise ValueError("Attention.window looks back only, so it needs causal=True")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"Attention.soft_cap must be positive, got {self.soft_cap}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Attention.dropout must be in [0, 1), got {self.dropout}")
        if self.head_dim is not None and isinstance(self.position, RoPE):
            self.position.rotated(self.head_dim)

    def check(self, dim: int) -> None:
        """Raise `ValueError` if heads do not divide `dim` or cannot be rotated."""
        size = self.head_size(dim)
        if isinstance(self.position, RoPE):
            self.position.rotated(size)

    def head_size(self, dim: int) -> int:
        """Return the channels of a head in a model of width `dim`. Raises `ValueError` if heads do not divide it."""
        if self.head_dim is not None:
            return self.head_dim
        if dim % self.heads:
            raise ValueError(f"Attention.heads ({self.heads}) must divide dim ({dim}), or give head_dim")
        return dim // self.heads

    def build(self, dim: int) -> nn.Module:
        """Return the module for vectors of `dim` numbers."""
        return AttentionModule(dim, self)


class KeyValueCache(MixerCache):
    """Keys (already rotated) and values by slot: token t stands in slot t, or in t mod capacity when rolling."""

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        rolling: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.capacity, self.rolling = capacity, rolling

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens; what is stored next takes their slots."""
        if self.rolling:
            super().truncate(length)

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, heads, time, head_dim); return all that the new tokens may look at.

        In the order of `visible_order`. A chunk in a rolling cache sees the old slots and the chunk itself, side by
        side, since storing it first would overwrite tokens that its own first tokens still see.
        """
        time = keys.shape[2]
        if not self.rolling:
            end = start + time
            self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
            return self.keys[:, :, :end], self.values[:, :, :end]
        held = min(start, self.capacity)
        if time == 1:
            slot = start % self.capacity
            self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1] = keys, values
            held = min(start + 1, self.capacity)
            return self.keys[:, :, :held], self.values[:, :, :held]
        seen = torch.cat((self.keys[:, :, :held], keys), 2), torch.cat((self.values[:, :, :held], values), 2)
        kept = min(time, self.capacity)
        slots = torch.arange(start + time - kept, start + time, device=keys.device) % self.capacity
        self.keys[:, :, slots], self.values[:, :, slots] = keys[:, :, -kept:], values[:, :, -kept:]
        return seen

    def visible_order(self, start: int, time: int, device: torch.device) -> Int[Tensor, " slots"]:
        """Return which token (counted from the first of the sequence) each key of `extend` belongs to."""
        end = start + time
        if not self.rolling:
            return torch.arange(end, device=device)
        last = end if time == 1 else start  # a single token is stored before it looks
        slots = torch.arange(min(last, self.capacity), device=device)
        order = slots + (last - 1 - slots).div(self.capacity, rounding_mode="floor") * self.capacity
        return order if time == 1 else torch.cat((order, torch.arange(start, end, device=device)))


def _visibility(stream: Stream, cache: KeyValueCache | None, causal: bool, window: int | None) -> Visibility:
    rolling = cache.capacity if cache is not None and cache.rolling else None
    key = ("visibility", causal, window, rolling, cache is None)
    if key not in stream.memo:
        stream.memo[key] = _see(stream, cache, causal, window)
    return stream.memo[key]


def _see(stream: Stream, cache: KeyValueCache | None, causal: bool, window: int | None) -> Visibility:
    start, time, device = stream.start, stream.time, stream.positions.device
    end = start + time
    in_window = window is None or end <= window
    one_document = stream.history is None and stream.among is None
    if one_document and not causal:
        return Visibility(causal=False, mask=None)
    if one_document and time == 1 and (in_window or (cache is not None and cache.rolling)):
        return Visibility(causal=False, mask=None)
    if one_document and start == 0 and in_window:
        return Visibility(causal=True, mask=None)
    if pieces := _pieces(stream, causal, window):
        return Visibility(causal=False, pieces=pieces)
    keys = cache.visible_order(start, time, device) if cache is not None else torch.arange(end, device=device)
    queries = torch.arange(start, end, device=device)[:, None]
    seen = torch.ones(time, len(keys), dtype=torch.bool, device=device)
    if stream.among is not None:
        seen[:, keys >= start] = stream.among[:, keys[keys >= start] - start]
    elif causal:
        seen &= keys <= queries
    if window is not None:
        seen &= keys > queries - window
    mask = seen[None, None]
    if stream.history is not None:
        assert stream.segments is not None
        mask = mask & (stream.segments[:, None, :, None] == stream.history[:, keys][:, None, None, :])
    return Visibility(causal=False, mask=mask)


def _pieces(stream: Stream, causal: bool, window: int | None) -> tuple[Piece, ...] | None:
    """Divide what a whole sequence sees, where that saves more than half: packed documents, and windows in long rows.

    On a CPU only: elsewhere reading where documents end would wait for the device at every call.
    """
    device, time = stream.positions.device, stream.time
    if stream.start or stream.among is not None or device.type != "cpu" or time < 64 or torch.compiler.is_compiling():
        return None
    if stream.segments is not None:
        pieces = documents(stream.segments, causal=causal, window=window)
        rows = len(stream.segments)
    else:
        pieces, rows = None if window is None else tuple(band(time, window, device)), 1
    return pieces if pieces is not None and worthwhile(pieces, rows, time, time) else None


class AttentionModule(nn.Module):
    """The module of `Attention`.

    Taps: `pattern` (batch, heads, query, key), the attention weights; `heads` (batch, time, heads, head_dim), each
    head's output before the output projection. Recording `pattern` computes it beside the fused kernel; editing it
    makes the edited one count.
    """

    def __init__(self, dim: int, spec: Attention) -> None:
        super().__init__()
        self.spec = spec
        spec.check(dim)
        self.head_dim = spec.head_size(dim)
        self.kv_heads = spec.heads if spec.kv_heads is None else spec.kv_heads
        self.scale = self.head_dim**-0.5 if spec.scale is None else spec.scale
        output_bias = spec.bias if spec.output_bias is None else spec.output_bias
        self.query = nn.Linear(dim, spec.heads * self.head_dim, bias=spec.bias)
        self.key = nn.Linear(dim, self.kv_heads * self.head_dim, bias=spec.bias)
        self.value = nn.Linear(dim, self.kv_heads * self.head_dim, bias=spec.bias)
        self.query_norm = spec.qk_norm.build(self.head_dim) if spec.qk_norm else None
        self.key_norm = spec.qk_norm.build(self.head_dim) if spec.qk_norm else None
        relative = spec.position if isinstance(spec.position, RelativePosition) else None
        self.relative = relative.build(spec.heads, self.head_dim) if relative is not None else None
        self.pattern = Tap()
        self.heads = Tap()
        self.output = residual_output(nn.Linear(spec.heads * self.head_dim, dim, bias=output_bias))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """Return an empty cache for `capacity` tokens; with a window it rolls over `window` slots."""
        rolling = self.spec.window is not None and self.spec.window < capacity
        slots = self.spec.window if rolling and self.spec.window is not None else capacity
        return KeyValueCache(batch, self.kv_heads, slots, self.head_dim, rolling, dtype, device)

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        if stream.among is not None and (self.spec.window is not None or self.relative is not None):
            raise ValueError("`among` says which tokens see each other: a window or relative positions count otherwise")
        queries = self.query(x).unflatten(-1, (self.spec.heads, self.head_dim)).transpose(1, 2)
        keys = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        position = self.spec.position
        if isinstance(position, RoPE):
            cos, sin = position.tables(stream, self.head_dim, queries.dtype)
            queries, keys = position.rotate(queries, cos, sin), position.rotate(keys, cos, sin)
        cache = stream.cache
        if cache is not None:
            assert isinstance(cache, KeyValueCache)
            keys, values = cache.extend(keys, values, stream.start)
        visible = _visibility(stream, cache, self.spec.causal, self.spec.window)
        if self.relative is not None:
            visible = self._place(self.relative, queries, stream, cache, visible)
        heads = self._attend(queries, keys, values, visible).transpose(1, 2)
        return self.output(self.heads(heads).flatten(2))

    def _place(
        self,
        relative: RelativeModule,
        queries: Tensor,
        stream: Stream,
        cache: KeyValueCache | None,
        visible: Visibility,
    ) -> Visibility:
        """Add to the visibility what relative positions say; layers whose scores are the same share them."""
        rolling = cache.capacity if cache is not None and cache.rolling else None
        where = ("distance", rolling, cache is None)
        if where not in stream.memo:
            device, end = queries.device, stream.start + stream.time
            keys = torch.arange(end, device=device)
            if cache is not None:
                keys = cache.visible_order(stream.start, stream.time, device)
            stream.memo[where] = keys - torch.arange(stream.start, end, device=device)[:, None]
        distance = stream.memo[where]
        shared = relative.shares()
        if shared is None:
            return visible.biased(relative.scores(queries, distance), distance)
        key = ("relative", shared, queries.dtype, where, self.spec.causal, self.spec.window)
        if key not in stream.memo:
            stream.memo[key] = visible.biased(relative.scores(queries, distance), distance)
        return stream.memo[key]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Visibility) -> Tensor:
        pattern: Tensor | None = None
        if self.pattern.listened:
            computed = self.weights(queries, keys, visible)
            listened_to = self.pattern(computed)
            pattern = None if listened_to is computed else listened_to
        by_distance = self.relative is not None and self.relative.changes_values
        if pattern is None and self.spec.soft_cap is None and not by_distance:
            return self._fused(queries, keys, values, visible)
        if pattern is None:
            pattern = self.weights(queries, keys, visible)
        if self.training and self.spec.dropout:
            pattern = F.dropout(pattern, self.spec.dropout)
        grouped = pattern.unflatten(1, (self.kv_heads, -1)) @ values[:, :, None]
        heads = grouped.flatten(1, 2)
        if by_distance and self.relative is not None and visible.distance is not None:
            heads = heads + self.relative.values(pattern, visible.distance)
        return heads

    def weights(
        self, queries: Float[Tensor, "batch heads query head_dim"], keys: Tensor, visible: Visibility
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the attention weights, computed plainly: the oracle of the fused kernel, and what `pattern` shows."""
        grouped = queries.unflatten(1, (self.kv_heads, -1))
        scores = (grouped @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * self.scale
        if self.spec.soft_cap is not None:
            scores = self.spec.soft_cap * torch.tanh(scores / self.spec.soft_cap)
        mask = visible.dense(queries.shape[2], keys.shape[2], queries.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
        return torch.softmax(scores, -1, dtype=wide).to(scores.dtype)

    def _fused(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Visibility) -> Tensor:
        dropout = self.spec.dropout if self.training else 0.0
        if visible.pieces is not None:
            return by_piece(visible.pieces, queries, keys, values, self._fused_piece)
        if queries.shape[2] == 1 and self.kv_heads < self.spec.heads:
            # One new token: the queries of a group take the place of time, so shared keys are read once, not copied.
            grouped = queries.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
            mask = visible.mask
            if mask is not None and mask.shape[1] > 1:  # a number for each head: its group's rows
                mask = mask.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
            out = F.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask, dropout_p=dropout, scale=self.scale
            )
            return out.flatten(1, 2)[:, :, None]
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=visible.mask,
            dropout_p=dropout,
            is_causal=visible.causal,
            scale=self.scale,
            enable_gqa=self.kv_heads < self.spec.heads,
        )

    def _fused_piece(self, queries: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        return self._fused(queries, keys, values, Visibility(piece.causal, piece.mask))
