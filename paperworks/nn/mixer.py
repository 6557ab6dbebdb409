"""The contract of whatever moves information along time: attention, recurrent and state-space layers."""

from dataclasses import dataclass

from torch import nn

from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Mixer(Spec):
    """What moves information along time: `build(dim)` gives a module with `forward(x, stream)` and `new_cache`."""

    def check(self, dim: int) -> None:
        """Raise `ValueError` if this mixer cannot work on vectors of `dim` numbers."""

    def build(self, dim: int) -> nn.Module:
        """Return the module for vectors of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")
