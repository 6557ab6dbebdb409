"""Attention (Vaswani et al. 2017), grouped-query (Ainslie et al. 2023, arXiv:2305.13245), with or without a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.linear import residual_output
from paperworks.nn.attention.backends import Inputs, attend, mix, pattern
from paperworks.nn.attention.cache import KeyValueCache
from paperworks.nn.attention.mask import Mask, mask_of
from paperworks.nn.mixer import Mixer
from paperworks.nn.norm import Norm
from paperworks.nn.placement import Placement
from paperworks.nn.position.relative import RelativePosition
from paperworks.nn.position.rotary import Rotary
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
        window: each token sees this many tokens, itself included (and, where not causal, as many after it); None: all.
        causal: whether later tokens are hidden.
        position: rotary positions (`RoPE`), relative ones (`ALiBi`, `RelativeBuckets`, `RelativeVectors`), or None.
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
    position: Rotary | RelativePosition | None = None
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
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"Attention.soft_cap must be positive, got {self.soft_cap}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Attention.dropout must be in [0, 1), got {self.dropout}")
        if self.head_dim is not None and isinstance(self.position, Rotary):
            self.position.rotated(self.head_dim)

    def check(self, dim: int) -> None:
        """Raise `ValueError` if heads do not divide `dim` or cannot be rotated."""
        size = self.head_size(dim)
        if isinstance(self.position, Rotary):
            self.position.rotated(size)

    def head_size(self, dim: int) -> int:
        """Channels of a head in a model of width `dim`. Raises `ValueError` if heads do not divide it."""
        if self.head_dim is not None:
            return self.head_dim
        if dim % self.heads:
            raise ValueError(f"Attention.heads ({self.heads}) must divide dim ({dim}), or give head_dim")
        return dim // self.heads

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return AttentionModule(dim, self)


class AttentionModule(nn.Module):
    """The module of `Attention`: project, remember, mask, attend, put out; a variant replaces one of these.

    Taps: `pattern` (batch, heads, query, key), the attention weights; `heads` (batch, time, heads, head_dim), each
    head's output before the output projection. Recording `pattern` computes it beside the fused kernel; editing it
    makes the edited one count.
    """

    obeys_visibility = True

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
        """An empty cache for `capacity` tokens; with a causal window it rolls over `window` slots."""
        window = self.spec.window if self.spec.causal else None
        rolling = window is not None and window < capacity
        slots = window if rolling and window is not None else capacity
        return KeyValueCache(batch, self.kv_heads, slots, self.head_dim, rolling, dtype, device)

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        queries, keys, values = self.project(x, placement)
        cache = placement.cache
        if cache is not None:
            if not isinstance(cache, KeyValueCache):
                raise TypeError(f"{type(self).__name__} was given a {type(cache).__name__}: use the model's new_cache")
            keys, values = cache.extend(keys, values, placement.start)
        mask = self.mask(queries, placement, cache)
        heads = self.attend(queries, keys, values, mask).transpose(1, 2)  # (batch, time, heads, head_dim)
        out: Tensor = self.output(self.heads(heads).flatten(2))
        return out

    def project(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, time, head_dim) each, normed and rotated."""
        queries = self.query(x).unflatten(-1, (self.spec.heads, self.head_dim)).transpose(1, 2)
        keys = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if isinstance(self.spec.position, Rotary):
            queries, keys = self.spec.position.turn(queries, keys, placement)
        return queries, keys, values

    def mask(self, queries: Tensor, placement: Placement, cache: KeyValueCache | None) -> Mask:
        """What is seen, with the numbers that relative positions add; layers whose scores are the same share them."""
        if placement.attention_only and (self.relative is not None or self.spec.window is not None):
            raise ValueError(
                f"{type(placement).__name__} says which tokens see each other: a window or relative positions count "
                "otherwise"
            )
        mask = mask_of(placement, cache, self.spec.causal, self.spec.window)
        if self.relative is None:
            return mask
        shared = self.relative.shares()
        if shared is None:
            return mask.biased(self.relative.scores(queries, mask.distance()))
        key = ("relative", shared, queries.dtype, id(mask))
        if key not in placement.memo:
            placement.memo[key] = mask.biased(self.relative.scores(queries, mask.distance()))
        out: Mask = placement.memo[key]
        return out

    def attend(
        self, queries: Float[Tensor, "batch heads query head_dim"], keys: Tensor, values: Tensor, mask: Mask
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """The heads' outputs."""
        inputs = Inputs(
            queries=queries,
            keys=keys,
            values=values,
            mask=mask,
            scale=self.scale,
            soft_cap=self.spec.soft_cap,
            dropout=self.spec.dropout if self.training else 0.0,
        )
        weights: Tensor | None = None
        if self.pattern.listened:
            computed = pattern(inputs)
            listened_to = self.pattern(computed)
            weights = None if listened_to is computed else listened_to
        by_distance = self.relative is not None and self.relative.changes_values
        if weights is None and not by_distance:
            return attend(inputs)
        weights = pattern(inputs) if weights is None else weights
        heads = mix(weights, values, inputs.dropout)
        if by_distance and self.relative is not None:
            heads = heads + self.relative.values(weights, mask.distance())
        return heads
