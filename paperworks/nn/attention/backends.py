"""How attention is computed: each backend gives the same numbers for the inputs it takes, at another cost.

    reference    the equations, with the pattern in memory: soft caps, and the oracle of all others
    pieces       documents and windows one by one, so that packed rows cost what their documents are long (CPU)
    packed       the same as one operator that `torch.compile` does not look into (CPU)
    varlen       the same by one kernel call (GPU)
    fused        torch's scaled dot product attention under a dense mask, or causal without one

`attend` takes the first that can. Nothing else in the library computes scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperworks.nn.attention.mask import Mask
from paperworks.nn.attention.pieces import Piece, by_piece, worthwhile

SHORTEST = 64  # rows shorter than this gain nothing from being divided


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a backend computes from.

    Attributes:
        queries: (batch, heads, queries, dim); keys: (batch, kv_heads, keys, dim); values: (batch, kv_heads, keys,
            value_dim). Each key-value head is shared by heads / kv_heads consecutive query heads.
        mask: what is seen.
        scale: what scores are multiplied by; soft_cap: scores become cap * tanh(score / cap), or None.
        dropout: the share of attention weights dropped.
    """

    queries: Float[Tensor, "batch heads queries dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    values: Float[Tensor, "batch kv_heads keys value_dim"]
    mask: Mask
    scale: float
    soft_cap: float | None = None
    dropout: float = 0.0

    @property
    def shared(self) -> bool:
        """Whether several query heads read one key-value head."""
        return self.keys.shape[1] < self.queries.shape[1]


def scores(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Scaled scores, -inf where a bool mask is False; a float mask is added. Shared keys are not copied."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    found: Tensor = (grouped @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
    if soft_cap is not None:
        found = soft_cap * torch.tanh(found / soft_cap)
    if mask is None:
        return found
    out: Tensor = found.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else found + mask
    return out


def pattern(inputs: Inputs) -> Float[Tensor, "batch heads queries keys"]:
    """Attention weights: softmax of the scores, in float32 or wider."""
    found = scores(inputs.queries, inputs.keys, inputs.mask.dense(), inputs.scale, inputs.soft_cap)
    wide = torch.float32 if found.dtype in (torch.float16, torch.bfloat16) else found.dtype
    return torch.softmax(found, -1, dtype=wide).to(found.dtype)


def mix(weights: Tensor, values: Tensor, dropout: float = 0.0) -> Float[Tensor, "batch heads queries value_dim"]:
    """The values, weighted by a pattern (batch, heads, queries, keys)."""
    if dropout:
        weights = F.dropout(weights, dropout)
    out: Tensor = (weights.unflatten(1, (values.shape[1], -1)) @ values[:, :, None]).flatten(1, 2)
    return out


def reference(inputs: Inputs) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention by its equations."""
    return mix(pattern(inputs), inputs.values, inputs.dropout)


def fused(inputs: Inputs) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention by torch's kernel."""
    mask = inputs.mask
    if mask.queries == 1 and inputs.shared:
        # One new token: the queries of a group take the place of time, so shared keys are read once, not copied.
        heads = inputs.keys.shape[1]
        grouped, dense = inputs.queries.unflatten(1, (heads, -1)).flatten(2, 3), mask.dense()
        if dense is not None and dense.shape[1] > 1:  # a number for each head: its group's rows
            dense = dense.unflatten(1, (heads, -1)).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            grouped, inputs.keys, inputs.values, attn_mask=dense, dropout_p=inputs.dropout, scale=inputs.scale
        )
        return out.flatten(1, 2)[:, :, None]
    causal = mask.is_plain_causal
    return F.scaled_dot_product_attention(
        inputs.queries,
        inputs.keys,
        inputs.values,
        attn_mask=None if causal else mask.dense(),
        dropout_p=inputs.dropout,
        is_causal=causal,
        scale=inputs.scale,
        enable_gqa=inputs.shared,
    )


def pieces(inputs: Inputs) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention piece by piece."""
    found = inputs.mask.pieces()
    assert found is not None
    return _by_piece(inputs, found)


def _by_piece(inputs: Inputs, found: tuple[Piece, ...]) -> Tensor:
    def attend_piece(queries: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        mask = Mask(
            queries=queries.shape[2],
            keys=keys.shape[2],
            device=queries.device,
            causal=piece.causal,
            seen=None if piece.mask is None else piece.mask[None, None],
        )
        return fused(replace(inputs, queries=queries, keys=keys, values=values, mask=mask))

    return by_piece(found, inputs.queries, inputs.keys, inputs.values, attend_piece)


@torch.library.custom_op("paperworks::packed_attention", mutates_args=())
def _packed(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, causal: bool, window: int, scale: float
) -> Tensor:
    """Attention inside segments, for a compiled model; a window of 0 is none."""
    return _divided(queries, keys, values, segments, causal, window, scale)


@_packed.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, causal: bool, window: int, scale: float
) -> Tensor:
    return queries.new_empty((*queries.shape[:-1], values.shape[-1]))


@torch.library.custom_op("paperworks::packed_attention_backward", mutates_args=())
def _packed_backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_packed` by its equations: an operator cannot call autograd. Patterns are computed again."""
    mask, found = _segment_mask(queries, segments, causal, window)
    whole = slice(0, mask.queries)
    parts = [(slice(None), whole, whole, mask.visible())] if found is None else _with_masks(found, queries.device)
    to_queries, to_keys, to_values = (torch.zeros_like(tensor) for tensor in (queries, keys, values))
    groups = (keys.shape[1], -1)
    for rows, query, key, seen in parts:
        q, out = queries[rows, :, query], gradient[rows, :, query].unflatten(1, groups)
        k, v = keys[rows, :, key], values[rows, :, key]
        weights = torch.softmax(scores(q, k, seen, scale), -1).unflatten(1, groups)
        to_weights = out @ v[:, :, None].transpose(-1, -2)
        to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale
        to_queries[rows, :, query] = (to_scores @ k[:, :, None]).flatten(1, 2)
        to_keys[rows, :, key] += (to_scores.transpose(-1, -2) @ q.unflatten(1, groups)).sum(2)
        to_values[rows, :, key] += (weights.transpose(-1, -2) @ out).sum(2)
    return to_queries, to_keys, to_values


def _with_masks(found: tuple[Piece, ...], device: torch.device) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    for piece in found:
        yield piece.rows, piece.queries, piece.keys, piece.seen(device)


@_packed_backward.register_fake
def _(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _keep_for_backward(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])  # type: ignore[attr-defined]
    ctx.options = inputs[4:]  # type: ignore[attr-defined]


def _packed_gradients(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved, options = ctx.saved_tensors, ctx.options  # type: ignore[attr-defined]
    return (*_packed_backward(gradient, *saved, *options), None, None, None, None)


_packed.register_autograd(_packed_gradients, setup_context=_keep_for_backward)


def _divided(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, causal: bool, window: int, scale: float
) -> Tensor:
    mask, found = _segment_mask(queries, segments, causal, window)
    inputs = Inputs(queries=queries, keys=keys, values=values, mask=mask, scale=scale)
    return (fused(inputs) if found is None else _by_piece(inputs, found)).contiguous()


def _segment_mask(
    queries: Tensor, segments: Tensor, causal: bool, window: int
) -> tuple[Mask, tuple[Piece, ...] | None]:
    """The mask, and its pieces where they pay."""
    time = queries.shape[2]
    mask = Mask(
        queries=time,
        keys=time,
        device=queries.device,
        causal=causal,
        window=window or None,
        segments=segments,
        key_segments=segments,
    )
    found = mask.pieces()
    return mask, found if found is not None and _pays(mask, found) else None


def packed(inputs: Inputs) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention inside segments as one operator."""
    mask = inputs.mask
    assert mask.segments is not None
    segments = mask.segments.expand(inputs.queries.shape[0], -1).contiguous()
    out: Tensor = _packed(
        inputs.queries, inputs.keys, inputs.values, segments, mask.causal, mask.window or 0, inputs.scale
    )
    return out


def varlen(
    inputs: Inputs, kernel: Callable[..., Tensor] | None = None
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention inside segments by a kernel for sequences of unequal length.

    Args:
        kernel: `torch.nn.attention.varlen.varlen_attn`, or a function with its arguments (to test without a GPU).
    """
    if kernel is None:
        from torch.nn.attention import varlen as torch_varlen  # imports the compiler: not before it is needed

        run: Callable[..., Any] = torch_varlen.varlen_attn
    else:
        run = kernel
    mask, time = inputs.mask, inputs.mask.queries
    rows, edges = inputs.queries.shape[0], mask.edges(inputs.queries.shape[0])
    assert edges is not None
    # heads of one document lie side by side: (batch * time, heads, dim)
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (inputs.queries, inputs.keys, inputs.values)]
    before = -1 if mask.window is None else mask.window - 1
    window = (before, 0) if mask.causal else (before, before)
    out: Tensor = run(*flat, edges, edges, time, time, scale=inputs.scale, window_size=window, enable_gqa=inputs.shared)
    result: Tensor = out.unflatten(0, (rows, time)).transpose(1, 2)
    return result


def _pays(mask: Mask, found: tuple[Piece, ...]) -> bool:
    rows = 1 if mask.segments is None else len(mask.segments)
    return worthwhile(found, rows, mask.queries, mask.keys)


def choose(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """The backend for these inputs."""
    mask, kind = inputs.mask, inputs.queries.device.type
    if inputs.soft_cap is not None:
        return reference
    divisible = mask.self_contained and mask.seen is None and mask.bias is None and mask.queries >= SHORTEST
    if not divisible or (mask.segments is None and mask.window is None):
        return fused
    if kind == "cuda" and _has_varlen(inputs) and mask.edges(inputs.queries.shape[0]) is not None:
        return varlen
    if kind == "cpu":
        if torch.compiler.is_compiling():
            plain = mask.segments is not None and not inputs.dropout and (mask.causal or mask.window is None)
            return packed if plain else fused
        found = mask.pieces()
        return pieces if found is not None and _pays(mask, found) else fused
    return fused


def _has_varlen(inputs: Inputs) -> bool:
    half = inputs.queries.dtype in (torch.float16, torch.bfloat16)
    same = inputs.values.shape[-1] == inputs.queries.shape[-1]
    return half and same and not inputs.dropout and _varlen_ships()


def _varlen_ships() -> bool:
    """Whether this torch has the kernel with the arguments used here (2.11 and later)."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return version >= (2, 11)


def attend(inputs: Inputs) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention by the backend that fits."""
    return choose(inputs)(inputs)
