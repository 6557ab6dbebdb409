"""The residual block: a mixer, a feed-forward part, maybe a cross-attention, in any arrangement."""

from __future__ import annotations

from dataclasses import dataclass

from paperworks.core.initialization import Part
from paperworks.models.arrangement import Arrangement, BlockModule, PreNorm
from paperworks.nn import Feedforward, Mixer, Norm


@dataclass(frozen=True, kw_only=True)
class Block(Part):
    """One layer.

    Attributes:
        norm: the norm before (or after) each part.
        mixer: what moves information along time.
        cross: what reads another sequence, between the two: an encoder-decoder's cross-attention; or None.
        feedforward: what works on each position; None for a block that only mixes.
        arrangement: where the norms stand: `PreNorm`, `PostNorm`, `Parallel`, `Sandwich`, `NoResidual`, `LayerScale`.
        dropout: the share of each part's output dropped in training.
    """

    norm: Norm
    mixer: Mixer
    cross: Mixer | None = None
    feedforward: Feedforward | None = None
    arrangement: Arrangement = PreNorm()
    dropout: float = 0.0

    def validate(self) -> None:
        """Check that the parts fit the arrangement."""
        self.arrangement.check(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Block.dropout must be in [0, 1), got {self.dropout}")

    def check(self, dim: int) -> None:
        """Raise `ValueError` if a part cannot work on vectors of `dim` numbers."""
        self.mixer.check(dim)
        if self.cross is not None:
            self.cross.check(dim)

    def build(self, dim: int) -> BlockModule:
        """The module for a residual stream of `dim` numbers."""
        return self.arrangement.build(dim, self)
