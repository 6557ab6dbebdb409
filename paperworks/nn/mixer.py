"""The contract of whatever moves information along time: attention, recurrent and state-space layers."""

from dataclasses import dataclass

from torch import nn

from paperworks.core.initialization import Part


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """What moves information along time.

    `build(dim)` gives a module with `forward(x, placement) -> x` on (batch, time, dim) and
    `new_cache(batch, capacity, dtype, device)`. Whole, in chunks, token by token, packed and padded give the same
    outputs. A module that obeys `Placement.visible` says so by `obeys_visibility = True`.
    """

    def check(self, dim: int) -> None:
        """Raise `ValueError` if this mixer cannot work on vectors of `dim` numbers."""

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")
