"""A summary of fixed size: what an encoder-decoder without attention reads (Cho et al. 2014, arXiv:1406.1078)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import residual_output
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import MixerCache, Placement


@dataclass(frozen=True, kw_only=True)
class FixedContext(Mixer):
    """y_t = C c at every t, where c is the last state of what `placement.context` holds (padding left out).

    It stands where cross-attention stands, so that the two differ in what they may read: one vector, or all of them.
    The recurrent layer after it receives c with every token, not at the first one only. In packed rows a token's c is
    the last state of its own segment.

    Attributes:
        context_dim: width of the context; None means that of the model.
    """

    context_dim: int | None = None

    def validate(self) -> None:
        """Check the width."""
        if self.context_dim is not None and self.context_dim < 1:
            raise ValueError(f"FixedContext.context_dim must be at least 1, got {self.context_dim}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return FixedContextModule(dim, self)


class SummaryCache(MixerCache):
    """What the summaries say to the tokens: (batch, 1, dim), or of packed rows (batch, other time, dim)."""

    def __init__(self) -> None:
        self.said: Tensor | None = None
        self.segments: Tensor | None = None

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        if self.said is not None:
            self.said = self.said.index_select(0, rows)
        if self.segments is not None:
            self.segments = self.segments.index_select(0, rows)

    def bytes(self) -> int:
        """The memory held, in bytes: whatever the length of what was read, unless rows are packed."""
        return 0 if self.said is None else self.said.nbytes


class FixedContextModule(nn.Module):
    """The module of `FixedContext`."""

    def __init__(self, dim: int, spec: FixedContext) -> None:
        super().__init__()
        self.spec = spec
        source = dim if spec.context_dim is None else spec.context_dim
        self.summary = residual_output(nn.Linear(source, dim, bias=False))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SummaryCache:
        """An empty cache, which the first call fills."""
        return SummaryCache()

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """What the summary says at each token. Raises `ValueError` without a context, or for another width."""
        cache = placement.cache if isinstance(placement.cache, SummaryCache) else None
        if cache is not None and cache.said is not None:
            said, segments = cache.said, cache.segments
        else:
            said, segments = self._read(placement, len(x))
            if cache is not None:
                cache.said, cache.segments = said, segments
        if segments is None:
            return said.expand(-1, x.shape[1], -1)
        assert placement.segments is not None
        mine = segments[:, None, :] == placement.segments[:, :, None]
        last = segments.shape[1] - 1 - mine.flip(-1).int().argmax(-1)
        found = said.gather(1, last[..., None].expand(-1, -1, said.shape[-1]))
        return found * mine.any(-1, keepdim=True)  # a segment for which nothing was read is told nothing

    def _read(self, placement: Placement, batch: int) -> tuple[Tensor, Tensor | None]:
        context, segments = placement.context, placement.context_segments
        if context is None:
            raise ValueError("FixedContext has nothing to read: pass context=(batch, other time, dim) to the model")
        width = self.summary.in_features
        if context.dim() != 3 or context.shape[0] != batch or context.shape[1] < 1 or context.shape[-1] != width:
            raise ValueError(
                f"context must have shape ({batch}, other time of at least 1, {width}), got {tuple(context.shape)}"
            )
        if segments is None:
            return self.summary(context[:, -1:]), None
        if placement.segments is not None:
            return self.summary(context), segments
        real = segments > 0
        if context.device.type == "cpu" and not bool(real.any(1).all()):
            row = int((~real.any(1)).nonzero()[0])
            raise ValueError(f"row {row} of the context is all padding: it has no last state; leave it out")
        last = segments.shape[1] - 1 - real.flip(1).int().argmax(1)
        return self.summary(context[torch.arange(batch, device=context.device), last][:, None]), None
