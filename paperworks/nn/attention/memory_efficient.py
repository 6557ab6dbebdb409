"""`memory_efficient_attention` in the layout of xFormers (github.com/facebookresearch/xformers, 2022).

Exact attention whose memory is linear in length: the fused kernels of torch, called for each dense piece of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from paperworks.nn.attention.biases import AttentionBias
from paperworks.nn.attention.pieces import Piece, by_piece
from paperworks.nn.attention.reference.tiled import Partial, merge


def memory_efficient_attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys heads dim"],
    value: Float[Tensor, "batch keys heads value_dim"],
    attn_bias: AttentionBias | Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "batch queries heads value_dim"]:
    """softmax(query key^T * scale + bias) value, with time before heads.

    Args:
        query, key, value: (batch, time, heads, dim), or (batch, time, groups, heads, dim) for queries that share keys:
            keys and values then have 1 head in each group, or as many as queries (expanded).
        attn_bias: an `AttentionBias`, or numbers to add that broadcast to (batch, heads, queries, keys), or None.
            Packed sequences (`BlockDiagonalMask`) stand in a batch of 1.
        p: the share of weights dropped.
        scale: None is dim^-0.5.

    Raises `ValueError` for shapes that do not fit, and names the layout. A query that sees no key gets zeros.
    """
    _check(query, key, value)
    if query.dim() == 5:
        groups, heads = query.shape[2:4]
        shared = (_shared(key), _shared(value))
        out = _attend(query.flatten(2, 3), *shared, attn_bias, p, scale)
        result: Tensor = out.unflatten(2, (groups, heads))
        return result
    return _attend(query, key, value, attn_bias, p, scale)


def merge_attentions(
    outs: Sequence[Float[Tensor, "batch queries heads dim"]], lses: Sequence[Float[Tensor, "batch heads queries"]]
) -> tuple[Float[Tensor, "batch queries heads dim"], Float[Tensor, "batch heads queries"]]:
    """Attention to all keys from attention to parts of them, and its log-sum-exp."""
    if not outs or len(outs) != len(lses):
        raise ValueError(f"each of one or more parts has an output and a log-sum-exp, got {len(outs)} and {len(lses)}")
    total = Partial(outs[0].transpose(1, 2), lses[0])
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        total = merge(total, Partial(out.transpose(1, 2), lse))
    return total.out.transpose(1, 2), total.log_sum


def swiglu_packed(
    x: Float[Tensor, "*batch dim"],
    w1w2: Float[Tensor, "2 hidden dim"],
    b1b2: Float[Tensor, "2 hidden"] | None,
    w3: Float[Tensor, "dim hidden"],
    b3: Float[Tensor, " dim"] | None,
) -> Float[Tensor, "*batch dim"]:
    """(silu(x w1^T + b1) * (x w2^T + b2)) w3^T + b3, both first products in one (Shazeer 2020)."""
    if w1w2.dim() != 3 or w1w2.shape[0] != 2:
        raise ValueError(f"w1w2 must be (2, hidden, dim), the gate first, got {tuple(w1w2.shape)}")
    both = functional.linear(x, w1w2.flatten(0, 1), None if b1b2 is None else b1b2.flatten())
    gate, up = both.chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, w3, b3)


def _shared(tensor: Tensor) -> Tensor:
    """(batch, time, groups, dim): the one head that a group of queries shares, or all of them."""
    if tensor.shape[3] == 1 or tensor.stride(3) == 0:
        return tensor[:, :, :, 0]
    return tensor.flatten(2, 3)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() not in (4, 5) or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(f"all must be (batch, time, heads, dim) or (batch, time, groups, heads, dim); got {shapes}")
    same_heads = (key.shape[-2] in (1, query.shape[-2])) if query.dim() == 5 else key.shape[2] == query.shape[2]
    if (
        key.shape[:-1] != value.shape[:-1]
        or query.shape[0] != key.shape[0]
        or query.shape[-1] != key.shape[-1]
        or query.shape[2:-2] != key.shape[2:-2]
        or not same_heads
    ):
        raise ValueError(
            f"shapes do not fit, (batch, time, [groups,] heads, dim) are needed, time before heads: {shapes}"
        )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias | Tensor | None, p: float, scale: float | None
) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))

    def fused(some: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if not keys.shape[2]:
            return some.new_zeros(*some.shape[:-1], values.shape[-1])
        shared = keys.shape[1] < some.shape[1]
        return functional.scaled_dot_product_attention(
            some, keys, values, attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale, enable_gqa=shared
        )

    def piecewise(some: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        return fused(some, keys, values, piece.mask, piece.causal)

    if isinstance(bias, AttentionBias):
        pieces = bias.pieces(query.shape[2], key.shape[2], query.device)
        out = by_piece(pieces, query, key, value, piecewise)
    else:
        out = fused(query, key, value, bias, False)
    return out.transpose(1, 2)
