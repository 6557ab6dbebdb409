"""Positions inside attention scores: ALiBi (Press et al. 2021), T5's buckets (Raffel et al. 2019), and the relative
vectors of Shaw et al. (2018).

Distances count tokens of the sequence, so padding in front and other documents in the row change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class RelativePosition(Spec):
    """What attention adds to its scores by the distance between query and key.

    `build(heads, head_dim)` gives a module with `scores(queries, distance) -> (1 or batch, heads, query, key)`, added
    after scaling, where distance = key - query (query, key); and `values(pattern, distance)`, added to what the heads
    return, or None where there is none.
    """

    def build(self, heads: int, head_dim: int) -> RelativeModule:
        """The module for so many heads."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


class RelativeModule(nn.Module):
    """The module of a `RelativePosition`."""

    reads_queries = False  # whether `scores` depends on them: if not, layers may share what it returns
    changes_values = False

    def scores(
        self, queries: Float[Tensor, "batch heads query head_dim"], distance: Int[Tensor, "query key"]
    ) -> Float[Tensor, "batch heads query key"]:
        """Numbers to add to the scaled scores."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds to scores")

    def values(
        self, pattern: Float[Tensor, "batch heads query key"], distance: Int[Tensor, "query key"]
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """Vectors to add to the heads' outputs."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to the values")

    def shares(self) -> object | None:
        """What identifies this module's scores within one forward call, or None if they are its own."""
        return None


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """ALiBi's slope of each head: 2^(-8k/h), k = 1 .. h, for a power of two.

    Otherwise the slopes of the power of two below, followed by every second slope of the power of two above.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 2 ** math.floor(math.log2(heads))
    slopes: Tensor = 2.0 ** (-8.0 * torch.arange(1, power + 1) / power)
    if power == heads:
        return slopes
    between = 2.0 ** (-8.0 * torch.arange(1, 2 * power + 1) / (2 * power))
    return torch.cat((slopes, between[::2][: heads - power]))


@dataclass(frozen=True, kw_only=True)
class ALiBi(RelativePosition):
    """Attention with linear biases (Press et al. 2021, arXiv:2108.12409): -slope_h * |query - key| added to scores.

    Nothing is learned, and scores beyond the trained length go on as before. See `alibi_slopes`.
    """

    def build(self, heads: int, head_dim: int) -> RelativeModule:
        """The module for so many heads."""
        return ALiBiModule(heads)


class ALiBiModule(RelativeModule):
    """The module of `ALiBi`; slopes are float32, whatever the model's dtype."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self._slopes: dict[torch.device, Tensor] = {}

    def shares(self) -> object | None:
        """Layers of as many heads share their scores."""
        return ("alibi", self.heads)

    def scores(self, queries: Tensor, distance: Tensor) -> Tensor:
        """-slope * |distance|."""
        if distance.device not in self._slopes:
            self._slopes[distance.device] = alibi_slopes(self.heads).to(distance.device)
        wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
        slopes = self._slopes[distance.device].to(wide)
        return (-slopes[:, None, None] * distance.abs().to(wide))[None].to(queries.dtype)


def bucket(
    distance: Int[Tensor, "*shape"], buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True
) -> Int[Tensor, "*shape"]:
    """T5's bucket of each distance = key - query.

    Half of the buckets (bidirectional) are for later keys. Of the B that remain, B/2 are for one distance each, the
    others widen logarithmically up to `max_distance`, beyond which all fall into the last.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = (far.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(far < exact, far, wide)


@dataclass(frozen=True, kw_only=True)
class RelativeBuckets(RelativePosition):
    """T5's positions (Raffel et al. 2019, arXiv:1910.10683): a learned number for each head and bucket of distances.

    Attributes:
        buckets: rows of the table.
        max_distance: where the last bucket begins, in tokens.
        bidirectional: whether half of the buckets are for later keys (encoders).
        shared: whether all layers of a stack read one table, the first layer's.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    shared: bool = True

    def validate(self) -> None:
        """Check that both ranges of buckets exist."""
        one_way = self.buckets // 2 if self.bidirectional else self.buckets
        if one_way < 2 or self.buckets % (4 if self.bidirectional else 2):
            raise ValueError(
                f"RelativeBuckets.buckets must be a multiple of {4 if self.bidirectional else 2}, got {self.buckets}"
            )
        if self.max_distance <= one_way // 2:
            raise ValueError(
                f"RelativeBuckets.max_distance ({self.max_distance}) must exceed the {one_way // 2} distances that "
                "have a bucket of their own"
            )

    def build(self, heads: int, head_dim: int) -> RelativeModule:
        """The module for so many heads."""
        return RelativeBucketTable(heads, self)


class RelativeBucketTable(RelativeModule):
    """The module of `RelativeBuckets`; `weight` is (buckets, heads)."""

    def __init__(self, heads: int, spec: RelativeBuckets) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.buckets, heads))

    def shares(self) -> object | None:
        """Layers that hold one table share their scores."""
        return id(self.weight) if self.spec.shared else None

    def scores(self, queries: Tensor, distance: Tensor) -> Tensor:
        """The table's rows for these distances."""
        spec = self.spec
        rows = bucket(distance, spec.buckets, spec.max_distance, bidirectional=spec.bidirectional)
        return self.weight[rows].permute(2, 0, 1)[None].to(queries.dtype)

    @staticmethod
    def share_layers(tables: list[RelativeBucketTable]) -> None:
        """Let all layers of a stack whose buckets are shared hold the first one's table."""
        shared = [table for table in tables if table.spec.shared]
        for table in shared[1:]:
            first = shared[0].weight
            if table.weight.shape != first.shape:
                raise ValueError(
                    f"layers that share RelativeBuckets must have as many heads: {first.shape[1]} and "
                    f"{table.weight.shape[1]}; give these layers RelativeBuckets(shared=False)"
                )
            table.weight = first


@dataclass(frozen=True, kw_only=True)
class RelativeVectors(RelativePosition):
    """Shaw, Uszkoreit and Vaswani (2018, arXiv:1803.02155): learned vectors w[clip(key - query, -reach, reach)].

    Score = query . (key + wK) * scale, head = sum_j pattern_j (value_j + wV). The vectors are shared by the heads of
    a layer. Scores are gathered from query . wK (2 reach + 1 numbers a query), so no (query, key, head_dim) tensor is
    ever made.

    Attributes:
        reach: the largest distance told apart (k).
        keys, values: whether there is a wK, a wV.
    """

    reach: int = 16
    keys: bool = True
    values: bool = True

    def validate(self) -> None:
        """Check the reach, and that something is left."""
        if self.reach < 0:
            raise ValueError(f"RelativeVectors.reach must be at least 0, got {self.reach}")
        if not (self.keys or self.values):
            raise ValueError("RelativeVectors needs keys or values; without both there is no position")

    def build(self, heads: int, head_dim: int) -> RelativeModule:
        """The module for heads of `head_dim` channels."""
        return RelativeVectorTables(head_dim, self)


class RelativeVectorTables(RelativeModule):
    """The module of `RelativeVectors`; `key` and `value` are (2 reach + 1, head_dim)."""

    reads_queries = True

    def __init__(self, head_dim: int, spec: RelativeVectors) -> None:
        super().__init__()
        self.reach = spec.reach
        self.changes_values = spec.values
        rows = 2 * spec.reach + 1
        self.scale = head_dim**-0.5
        self.key = nn.Parameter(torch.empty(rows, head_dim)) if spec.keys else None
        self.value = nn.Parameter(torch.empty(rows, head_dim)) if spec.values else None
        for table in (self.key, self.value):
            if table is not None:
                nn.init.normal_(table, std=head_dim**-0.5)

    def _rows(self, distance: Tensor) -> Tensor:
        return distance.clamp(-self.reach, self.reach) + self.reach

    def scores(self, queries: Tensor, distance: Tensor) -> Tensor:
        """Query . wK[distance] * head_dim^-0.5."""
        if self.key is None:
            return queries.new_zeros(1, 1, *distance.shape)
        by_row = queries @ self.key.t() * self.scale
        out: Tensor = by_row.gather(-1, self._rows(distance).expand(*by_row.shape[:2], -1, -1))
        return out

    def values(self, pattern: Tensor, distance: Tensor) -> Tensor:
        """sum_j pattern_j wV[distance_j]."""
        assert self.value is not None
        rows = self._rows(distance).expand_as(pattern)
        weights = pattern.new_zeros(*pattern.shape[:3], len(self.value)).scatter_add(-1, rows, pattern)
        return weights @ self.value
