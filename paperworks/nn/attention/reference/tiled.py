"""FlashAttention's algorithm, readable (Dao et al. 2022, arXiv:2205.14135), and the merging of partial attentions.

The fused kernels of torch are what runs in models; this is what they do, tile by tile, with a count of the traffic
between slow and fast memory. `merge` is the operator of tree attention (Shyam et al. 2024, arXiv:2408.04093).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

EMPTY = -math.inf  # the log-sum-exp over no keys


@dataclass
class Traffic:
    """Numbers read from and written to slow memory."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.read + self.written


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and of keys that are in fast memory at once.

    `Tiles.fitting(memory, dim)` gives the paper's: B_c = ceil(M / 4d) keys, B_r = min(B_c, d) queries (Algorithm 1).
    """

    queries: int
    keys: int

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1:
            raise ValueError(f"tiles need at least one row of each, got {self.queries} queries and {self.keys} keys")

    @staticmethod
    def fitting(memory: int, dim: int) -> Tiles:
        """The tiles for fast memory of `memory` numbers. Raises ValueError where not even one row fits."""
        if memory < 4 * dim:
            raise ValueError(f"fast memory of {memory} numbers holds no tile of rows of {dim}: 4 x {dim} are needed")
        keys = math.ceil(memory / (4 * dim))
        return Tiles(min(keys, dim), keys)


def tiled_attention(
    query: Float[Tensor, "*heads queries dim"],
    key: Float[Tensor, "*heads keys dim"],
    value: Float[Tensor, "*heads keys dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "*heads queries keys"] | None = None,
    scale: float | None = None,
    tiles: Tiles = Tiles(64, 64),
    traffic: Traffic | None = None,
) -> tuple[Float[Tensor, "*heads queries dim"], Float[Tensor, "*heads queries"]]:
    """Exact attention and the log-sum-exp of each query's scores, without the matrix of weights.

    For each tile of keys, for each tile of queries: scores S; their maximum and sum are folded into the running ones,
    and the output so far is rescaled by exp(old maximum - new maximum). The backward pass computes the weights again
    from the log-sum-exp, so extra memory is linear in length.

    Args:
        causal: the last query stands at the last key (bottom-right), and sees no later key.
        mask: True where a key is seen; a query that sees none gets zeros and a log-sum-exp of -inf.
        scale: of the scores; None is dim^-0.5.
        traffic: counts what a machine with fast memory for these tiles would move, if given.

    Raises ValueError for shapes that do not fit.
    """
    if query.shape[:-2] != key.shape[:-2] or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: heads and "
            "dim must be equal, and key and value of one shape"
        )
    if mask is not None and mask.shape[-2:] != (query.shape[-2], key.shape[-2]):
        raise ValueError(f"mask {tuple(mask.shape)} is not queries x keys ({query.shape[-2]} x {key.shape[-2]})")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    attended: tuple[Tensor, Tensor] = _Tiled.apply(query, key, value, causal, mask, factor, tiles, traffic)  # type: ignore[no-untyped-call]
    return attended


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        query, key, value, causal, mask, scale, tiles, traffic = given
        out = torch.zeros_like(query)
        largest = query.new_full(query.shape[:-1], EMPTY)
        total = torch.zeros_like(largest)
        for columns in _cut(key.shape[-2], tiles.keys):
            k, v = key[..., columns, :], value[..., columns, :]
            _count(traffic, read=(k, v))
            for rows in _cut(query.shape[-2], tiles.queries):
                scores = _scores(query[..., rows, :], k, scale, rows, columns, query, key, causal, mask)
                if scores is None:
                    continue  # a tile that nobody sees is not even loaded
                _count(traffic, read=(query[..., rows, :], out[..., rows, :], largest[..., rows], total[..., rows]))
                old = largest[..., rows]
                new = torch.maximum(old, scores.amax(-1))
                safe = new.masked_fill(new == EMPTY, 0.0)  # nothing seen so far: every weight is exp(-inf)
                weights, kept = torch.exp(scores - safe[..., None]), torch.exp(old - safe)
                total[..., rows] = kept * total[..., rows] + weights.sum(-1)
                out[..., rows, :] = kept[..., None] * out[..., rows, :] + weights @ v
                largest[..., rows] = new
                _count(traffic, written=(out[..., rows, :], largest[..., rows], total[..., rows]))
        out = out / torch.where(total > 0, total, 1.0)[..., None]
        log_sum = largest + total.log()
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.options = causal, mask, scale, tiles
        ctx.mark_non_differentiable(log_sum)
        return out, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        causal, mask, scale, tiles = ctx.options
        upstream = above[0]
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        common = (upstream * out).sum(-1)  # D of the paper
        safe = log_sum.masked_fill(log_sum == EMPTY, 0.0)
        for columns in _cut(key.shape[-2], tiles.keys):
            k, v = key[..., columns, :], value[..., columns, :]
            for rows in _cut(query.shape[-2], tiles.queries):
                q = query[..., rows, :]
                scores = _scores(q, k, scale, rows, columns, query, key, causal, mask)
                if scores is None:
                    continue
                weights = torch.exp(scores - safe[..., rows, None])
                to_value[..., columns, :] += weights.transpose(-1, -2) @ upstream[..., rows, :]
                to_weights = upstream[..., rows, :] @ v.transpose(-1, -2)
                to_scores = weights * (to_weights - common[..., rows, None]) * scale
                to_query[..., rows, :] += to_scores @ k
                to_key[..., columns, :] += to_scores.transpose(-1, -2) @ q
        return to_query, to_key, to_value, None, None, None, None, None


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: slice,
    columns: slice,
    query: Tensor,
    key: Tensor,
    causal: bool,
    mask: Tensor | None,
) -> Tensor | None:
    """The scores of one tile, -inf where not seen; None if nothing in it is."""
    offset = key.shape[-2] - query.shape[-2]
    if causal and columns.start > rows.stop - 1 + offset:
        return None
    seen: Tensor | None = None
    if causal:
        places = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + offset
        seen = torch.arange(columns.start, columns.stop, device=q.device) <= places
    if mask is not None:
        part = mask[..., rows, columns]
        seen = part if seen is None else part & seen
    if seen is not None and not bool(seen.any()):
        return None
    scores = q @ k.transpose(-1, -2) * scale
    return scores if seen is None else scores.masked_fill(~seen, EMPTY)


def _count(traffic: Traffic | None, read: tuple[Tensor, ...] = (), written: tuple[Tensor, ...] = ()) -> None:
    if traffic is not None:
        traffic.read += sum(tensor.numel() for tensor in read)
        traffic.written += sum(tensor.numel() for tensor in written)


def standard_traffic(queries: int, keys: int, dim: int) -> int:
    """The numbers that attention with its matrices in slow memory moves: S and P written and read, Q K V O."""
    return 2 * (queries + keys) * dim + 4 * queries * keys


class Partial(NamedTuple):
    """Attention to some of the keys: the output, and the log-sum-exp of the scores, which is its weight."""

    out: Float[Tensor, "*heads queries dim"]
    log_sum: Float[Tensor, "*heads queries"]


def merge(one: Partial, other: Partial) -> Partial:
    """Attention to the keys of both: outputs weighted by exp(log-sum-exp).

    Associative and commutative, so any tree over any division of the keys gives full attention; (0, -inf), which is
    attention to nothing, changes nothing.
    """
    log_sum = torch.logaddexp(one.log_sum, other.log_sum)
    safe = log_sum.masked_fill(log_sum == EMPTY, 0.0)
    weights = torch.exp(one.log_sum - safe)[..., None], torch.exp(other.log_sum - safe)[..., None]
    return Partial(weights[0] * one.out + weights[1] * other.out, log_sum)
