"""Settings of their own for the parameters that a pattern names."""

import math
from dataclasses import dataclass

from paperworks.core.spec import Spec


@dataclass(frozen=True)
class Group(Spec):
    """Learning rate or weight decay of some parameters, other than the run's.

        train.Settings(groups=(train.Group("*.bias", weight_decay=0.0), train.Group("blocks.0.*", lr_factor=0.1)))

    pattern: glob over parameter names with braces, as in `core.selection` ("blocks.*.mixer.{query,value}.weight"), or a
        named set of linear layers ("attention", "feedforward", "all-linear"). `*` crosses dots.
    lr_factor: their learning rate as a multiple of `Settings.lr`, at every step; None leaves it.
    weight_decay: their decay instead of the optimizer's, also for vectors; None leaves it.

    Where several groups name a parameter, each field is that of the last one that sets it.
    """

    pattern: str
    lr_factor: float | None = None
    weight_decay: float | None = None

    def validate(self) -> None:
        """Raise `ValueError` for a factor or decay out of its range, or for a group that sets nothing."""
        if self.lr_factor is None and self.weight_decay is None:
            raise ValueError(f"Group({self.pattern!r}) sets nothing: give lr_factor or weight_decay")
        if self.lr_factor is not None and not 0 < self.lr_factor < math.inf:
            raise ValueError(
                f"Group.lr_factor is {self.lr_factor!r}; it must be above 0, and finite. "
                "To leave parameters as they are, freeze them: requires_grad_(False)"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Group.weight_decay is {self.weight_decay!r}; it must be 0 or more, and finite")
