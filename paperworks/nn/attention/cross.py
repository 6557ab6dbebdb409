"""Cross-attention (Vaswani et al. 2017): queries from these tokens, keys and values from a context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.nn.attention.attention import Attention, AttentionModule
from paperworks.nn.attention.mask import Mask
from paperworks.nn.placement import MixerCache, Placement


@dataclass(frozen=True, kw_only=True)
class CrossAttention(Attention):
    """Attention to what `placement.context` holds: an encoder's output, retrieved chunks, image tokens.

    Every token sees the whole context, except its padding and, in packed rows, other segments' context. With a cache
    the keys and values of the context are computed once.

    Attributes:
        context_dim: width of the context; None means that of the model.
    """

    causal: bool = False
    context_dim: int | None = None

    def validate(self) -> None:
        """Check that nothing is asked that looks along one sequence only."""
        super().validate()
        if self.causal or self.window is not None:
            raise ValueError("CrossAttention sees the whole context: it takes neither causal=True nor a window")
        if self.position is not None:
            raise ValueError("CrossAttention has no positions: queries and keys stand in different sequences")
        if self.context_dim is not None and self.context_dim < 1:
            raise ValueError(f"CrossAttention.context_dim must be at least 1, got {self.context_dim}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return CrossAttentionModule(dim, self)


class ContextCache(MixerCache):
    """Keys and values of the context, and which of it each token sees; empty until the first call."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.segments: Tensor | None = None

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if self.segments is not None:
            self.segments = self.segments.index_select(0, rows)

    def bytes(self) -> int:
        """The memory held, in bytes."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values) if tensor is not None)

    def truncate(self, length: int) -> None:
        """Keep everything: the context does not grow with the tokens."""


class CrossAttentionModule(AttentionModule):
    """The module of `CrossAttention`. Taps: `pattern` (batch, heads, query, context) and `heads`, as in attention."""

    obeys_visibility = True  # who sees the context is not what such a placement speaks of

    def __init__(self, dim: int, spec: CrossAttention) -> None:
        super().__init__(dim, spec)
        source = dim if spec.context_dim is None else spec.context_dim
        if source != dim:
            self.key = nn.Linear(source, self.kv_heads * self.head_dim, bias=spec.bias)
            self.value = nn.Linear(source, self.kv_heads * self.head_dim, bias=spec.bias)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> ContextCache:  # type: ignore[override]
        """An empty cache, which the first call fills."""
        return ContextCache()

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Read the context at each token of x. Raises `ValueError` where there is none, or of another width."""
        queries = self.query(x).unflatten(-1, (self.spec.heads, self.head_dim)).transpose(1, 2)
        cache = placement.cache if isinstance(placement.cache, ContextCache) else None
        if cache is not None and cache.keys is not None and cache.values is not None:
            keys, values, segments = cache.keys, cache.values, cache.segments
        else:
            keys, values = self._read(placement.context, len(x))
            segments = placement.context_segments
            if cache is not None:
                cache.keys, cache.values, cache.segments = keys, values, segments
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        mask = Mask(queries=queries.shape[2], keys=keys.shape[2], device=x.device, seen=_seen(placement, segments))
        heads = self.attend(queries, keys, values, mask).transpose(1, 2)
        out: Tensor = self.output(self.heads(heads).flatten(2))
        return out

    def _read(self, context: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        if context is None:
            raise ValueError(
                "cross-attention has nothing to read: pass Placement(context=...), (batch, other time, dim)"
            )
        if context.dim() != 3 or context.shape[0] != batch or context.shape[-1] != self.key.in_features:
            raise ValueError(
                f"context must have shape ({batch}, other time, {self.key.in_features}), got {tuple(context.shape)}"
            )
        keys = self.key(context).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.value(context).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return keys, values


def _seen(placement: Placement, segments: Tensor | None) -> Tensor | None:
    """Which of the context each token sees: what is no padding, of its own segment if tokens have any."""
    if segments is None:
        return None
    if placement.segments is None:
        return (segments > 0)[:, None, None, :]
    mine = placement.segments[:, :, None]
    # padding sees everything: nobody looks at its output, which must only be finite
    return ((segments[:, None, :] == mine) | (mine == 0))[:, None]
