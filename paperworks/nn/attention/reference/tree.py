"""Tree attention (Shyam et al. 2024, arXiv:2408.04093): keys and values stay where they are, partial results travel.

Attention to some of the keys is an output and a log-sum-exp, and two such merge into one (`merge`), in any order. So a
cache can be spread over processes: each attends to its own share, and one all-reduce whose size does not depend on
the length gives the whole. Ring attention sends the keys and values round instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.nn.attention.attention import Attention, AttentionModule
from paperworks.nn.attention.backends import scores
from paperworks.nn.attention.cache import KeyValueCache
from paperworks.nn.attention.mask import Mask
from paperworks.nn.attention.reference.tiled import EMPTY, Partial, merge
from paperworks.nn.placement import Placement


@dataclass
class Exchange:
    """What simulated workers send: `rounds` one after the other, and `sent` numbers, of all workers together."""

    rounds: int = 0
    sent: int = 0


def partial_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim"],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """Attend to these keys alone; to none of them gives (0, -inf).

    Args:
        mask: broadcasts to (batch, heads, queries, keys): True where a key is seen, or a number to add to its score.
        scale: of the scores; None is dim^-0.5.
        soft_cap: scores become cap * tanh(score / cap).

    Raises ValueError where heads are no multiple of kv_heads. Keys are not copied for the heads that share them.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads: no multiple")
    found = scores(query, key, mask, query.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
    if not key.shape[2]:
        return Partial(torch.zeros_like(query), query.new_full(query.shape[:-1], EMPTY))
    log_sum = found.logsumexp(-1)
    weights = torch.exp(found - log_sum.masked_fill(log_sum == EMPTY, 0.0)[..., None])
    out = weights.unflatten(1, (key.shape[1], -1)) @ value[:, :, None]
    return Partial(out.flatten(1, 2), log_sum)


def reduce_tree(partials: Sequence[Partial], exchange: Exchange | None = None) -> Partial:
    """Merge pairs, pairs of pairs, and so on: ceil(log2 p) rounds up, and as many to tell everybody the result.

    A worker sends its output and the weight of each of its rows. Raises ValueError for no worker at all.
    """
    if not partials:
        raise ValueError("there is nothing to reduce: give the partial result of at least one worker")
    level = list(partials)
    count = exchange or Exchange()
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        moved = sum(_numbers(pair[1]) for pair in pairs if len(pair) == 2)
        level = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        count.rounds += 2  # one up, and the same way down again
        count.sent += 2 * moved
    return level[0]


def reduce_ring(
    query: Tensor, shards: Sequence[tuple[Tensor, Tensor]], exchange: Exchange | None = None
) -> list[Partial]:
    """Ring attention's way: every worker passes keys and values on, p - 1 times; returns what each one ends with."""
    count = exchange or Exchange()
    results = [partial_attention(query, *shard) for shard in shards]
    for hop in range(1, len(shards)):
        count.rounds += 1
        for worker in range(len(shards)):
            key, value = shards[(worker - hop) % len(shards)]
            count.sent += key.numel() + value.numel()
            results[worker] = merge(results[worker], partial_attention(query, key, value))
    return results


def _numbers(partial: Partial) -> int:
    return partial.out.numel() + partial.log_sum.numel()


def all_reduce(partial: Partial, group: dist.ProcessGroup | None = None) -> Partial:
    """Attention to the keys of all processes: the largest log-sum-exp, then two sums (Algorithm 3).

    A row that sees no key anywhere stays (0, -inf).
    """
    largest = partial.log_sum.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    weight = torch.exp(partial.log_sum - largest.masked_fill(largest == EMPTY, 0.0))
    both = torch.cat((partial.out * weight[..., None], weight[..., None]), -1)  # one message for the two sums
    dist.all_reduce(both, dist.ReduceOp.SUM, group=group)
    total = both[..., -1]
    out = both[..., :-1] / torch.where(total > 0, total, 1.0)[..., None]
    return Partial(out, largest + total.log())


def energy(
    query: Float[Tensor, "*heads queries dim"],
    key: Float[Tensor, "*heads keys dim"],
    value: Float[Tensor, "*heads keys channels"],
    source: Float[Tensor, "*heads queries channels"],
    scale: float | None = None,
) -> Tensor:
    """F(source) = sum_i log sum_a exp(q_i . k_a + source_i . v_a); its gradient at source 0 is attention."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (query @ key.transpose(-1, -2) * factor + source @ value.transpose(-1, -2)).logsumexp(-1).sum()


@dataclass(frozen=True, kw_only=True)
class TreeAttention(Attention):
    """`Attention` whose cache is spread over the processes of the default group: token t lies in process t mod p.

    All processes run the model on the same tokens; without a cache, or alone, it is `Attention`. `TreeAttention.of`
    makes one from an attention spec. Edits of attention patterns and vectors that relative positions add to values
    need whole patterns, and are refused.
    """

    @staticmethod
    def of(attention: Attention) -> TreeAttention:
        """The same attention, its cache spread."""
        return TreeAttention(**{field.name: getattr(attention, field.name) for field in fields(attention)})

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers; its weights are named as those of `Attention`."""
        return TreeAttentionModule(dim, self)


class SpreadCache(KeyValueCache):
    """The share of one process: tokens rank, rank + p, rank + 2p and so on."""

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank: int = dist.get_rank() if _several() else 0
        self.workers: int = dist.get_world_size() if _several() else 1
        super().__init__(batch, heads, math.ceil(capacity / self.workers), head_dim, False, dtype, device)

    def own(self, start: int, time: int) -> slice:
        """Which of `time` tokens from `start` on lie here."""
        return slice((self.rank - start) % self.workers, time, self.workers)

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store this process's share of new keys and values; return all of its share."""
        mine = self.own(start, keys.shape[2])
        first = len(range(self.rank, start, self.workers))
        end = len(range(self.rank, start + keys.shape[2], self.workers))
        self.keys[:, :, first:end], self.values[:, :, first:end] = keys[:, :, mine], values[:, :, mine]
        return self.keys[:, :, :end], self.values[:, :, :end]


class TreeAttentionModule(AttentionModule):
    """The module of `TreeAttention`."""

    def __init__(self, dim: int, spec: Attention) -> None:
        super().__init__(dim, spec)
        if self.relative is not None and self.relative.changes_values:
            raise ValueError("TreeAttention cannot add relative positions to values, for no process has all weights")
        self._spread: SpreadCache | None = None

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """This process's empty share; a window hides tokens, but does not shorten it."""
        return SpreadCache(batch, self.kv_heads, capacity, self.head_dim, dtype, device)

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache = placement.cache
        self._spread = cache if isinstance(cache, SpreadCache) and cache.workers > 1 else None
        try:
            return super().forward(x, placement)
        finally:
            self._spread = None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """The heads' outputs: attention to the keys here, joined with what the other processes have."""
        if self._spread is None:
            return super().attend(queries, keys, values, mask)
        if self.pattern.listened:
            raise ValueError("the attention pattern is spread over processes: take its tap with one process")
        dense = mask.dense()
        if dense is not None:
            dense = dense[..., self._spread.own(0, dense.shape[-1])]
        partial = partial_attention(queries, keys, values, mask=dense, scale=self.scale, soft_cap=self.spec.soft_cap)
        return all_reduce(partial).out


def _several() -> bool:
    out: bool = dist.is_available() and dist.is_initialized()
    return out
