"""An optimizer as a value: its settings, checked, recorded with the run, and built for parameter groups."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paperworks.core.spec import Spec

if TYPE_CHECKING:
    import torch

ParameterGroups = list[dict[str, Any]]

# For optimizers of other libraries: optimizer(groups) -> torch.optim.Optimizer. A run records its name only.
OptimizerFunction = Callable[[ParameterGroups], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(Spec):
    """Base of the optimizers that `Settings(optimizer=...)` takes.

    The learning rate is not a field: `Settings.lr` and its schedule set it. Where a method has a `weight_decay`, it
    applies to matrices only (see `train.parameter_groups`).
    """

    @abstractmethod
    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Optimizer of the given groups, each {"params": list of parameters, "lr": peak rate, "weight_decay": float}.

        "weight_decay" is missing where the method has none.
        """

    def validate(self) -> None:
        """Raise `ValueError` for a field out of its range: momenta in [0, 1), `eps` and decays 0 or more."""
        for name in ("betas", "alpha", "decay", "momentum"):
            for value in _numbers(getattr(self, name, ())):
                self._require(name, 0 <= value < 1, "in [0, 1)")
        for name in ("eps", "weight_decay"):
            for value in _numbers(getattr(self, name, ())):
                self._require(name, 0 <= value < math.inf, "0 or more, and finite")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {expected}")


def _numbers(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def name_of(optimizer: OptimizerFunction) -> str:
    """Full name of a function or class, as a run records it: "torch.optim.adagrad.Adagrad"."""
    named: Any = getattr(optimizer, "func", optimizer)  # functools.partial has no name of its own
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}.{named.__qualname__}"
