"""Gated recursive convolution: neighbours are merged, level by level, until one vector is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import MixerCache, Placement, places_in_segments
from paperworks.nn.tap import Tap


@dataclass(frozen=True, kw_only=True)
class GRConv(Mixer):
    """The pyramid of Cho, van Merrienboer, Bahdanau & Bengio 2014 (arXiv:1409.1259).

    h[j..t] = w_c tanh(W_l a + W_r b + d) + w_l a + w_r b, with a = h[j..t-1], b = h[j+1..t], the vectors of the two
    spans one shorter; (w_c, w_l, w_r) = softmax(G_l a + G_r b + e); h[t..t] = U x_t + u. All weights are shared.

    N tokens take N (N - 1) / 2 merges, in N - 1 levels. Output at token t is h[0..t], the vector of all tokens so far:
    its last one is the paper's summary of the sentence, and no token waits for those after it.

    Attributes:
        hidden: width of the vectors; None means dim. Another width is mapped back to dim by a linear layer.
    """

    hidden: int | None = None

    def validate(self) -> None:
        """Check the width."""
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"GRConv.hidden must be at least 1, got {self.hidden}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return GRConvModule(dim, self)


class EdgeCache(MixerCache):
    """The right edge of the pyramid, (batch, seen, hidden): the vector of each span that ends at the newest token."""

    def __init__(self, edge: Tensor) -> None:
        self.edge = edge

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.edge = self.edge.index_select(0, rows)

    def bytes(self) -> int:
        """The memory held, in bytes: it grows with the tokens seen."""
        return self.edge.nbytes


class GRConvModule(nn.Module):
    """The module of `GRConv`. Tap: `gates` (batch, spans, 3), once a level: the weights of merged, left and right."""

    def __init__(self, dim: int, spec: GRConv) -> None:
        super().__init__()
        self.width = dim if spec.hidden is None else spec.hidden
        self.input = nn.Linear(dim, self.width)
        self.left = nn.Linear(self.width, self.width + 3, bias=False)  # W_l and G_l
        self.right = nn.Linear(self.width, self.width + 3)  # W_r, G_r and the biases d, e
        self.gates = Tap()
        self.output = nn.Linear(self.width, dim) if self.width != dim else None

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> EdgeCache:
        """An empty pyramid."""
        return EdgeCache(torch.empty(batch, 0, self.width, dtype=dtype, device=device))

    def merge(self, left: Float[Tensor, "... hidden"], right: Float[Tensor, "... hidden"]) -> Tensor:
        """The vectors of spans from those of the two spans in each that are one token shorter."""
        given, weights = (self.left(left) + self.right(right)).split((self.width, 3), -1)
        gates = self.gates(torch.softmax(weights, -1))
        merged, keep_left, keep_right = gates.unbind(-1)
        out: Tensor = (
            merged[..., None] * torch.tanh(given) + keep_left[..., None] * left + keep_right[..., None] * right
        )
        return out

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """The vector of all tokens of the segment up to each one."""
        if placement.cache is not None and not isinstance(placement.cache, EdgeCache):
            raise TypeError(f"GRConv was given a {type(placement.cache).__name__}: the cache is another model's")
        leaves = self.input(x)
        edge = leaves[:, :0] if placement.cache is None else placement.cache.edge.to(leaves.dtype)
        seen, time = edge.shape[1], x.shape[1]
        levels = [leaves]  # level l holds the spans of l + 1 tokens that end at each new token, where there are any
        for level in range(1, seen + time):
            right = levels[-1]
            if level <= seen:  # the first new token's left neighbour ends at the newest of the old ones
                left = torch.cat((edge[:, seen - level, None], right[:, :-1]), 1)
            else:
                left, right = right[:, :-1], right[:, 1:]
            levels.append(self.merge(left, right))
        if placement.cache is not None:
            # level l of the last new token is the span that begins l tokens before it
            placement.cache.edge = torch.stack([level[:, -1] for level in reversed(levels)], 1).detach()
        out = self._roots(levels, placement, seen, time)
        return out if self.output is None else self.output(out)

    def _roots(self, levels: list[Tensor], placement: Placement, seen: int, time: int) -> Tensor:
        """Pick for each new token the span that begins where its segment does."""
        if placement.history is None:  # the longest span of each token is the first one of its level
            return torch.stack([vectors[:, 0] for vectors in levels[seen:]], 1)
        spans = places_in_segments(placement.history)[:, seen:]  # which level each token needs
        out = torch.zeros_like(levels[0])
        for level, vectors in enumerate(levels):
            first = time - vectors.shape[1]
            chosen = (spans[:, first:] == level)[..., None]
            out[:, first:] = torch.where(chosen, vectors, out[:, first:])
        return out
