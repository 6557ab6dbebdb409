"""Learning-rate schedules: how the rate falls from its peak once the warm-up is over."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from paperworks.core.errors import unknown


@dataclass(frozen=True)
class Schedule(ABC):
    """A curve from 1 (the peak) towards 0; `Settings` adds the warm-up before it and the floor below it."""

    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Height of the curve, in [0, 1], at `step` of `steps`, both counted from the end of the warm-up.

        The curve would arrive at its end at `step == steps`, which is never taken: no step is spent at rate 0.
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """1: the rate stays at its peak."""

    def __call__(self, step: int, steps: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """1 - step / steps."""

    def __call__(self, step: int, steps: int) -> float:
        """Share of the steps that is left."""
        return 1.0 - step / steps


@dataclass(frozen=True)
class Cosine(Schedule):
    """(1 + cos(pi * step / steps)) / 2, half a period of a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    def __call__(self, step: int, steps: int) -> float:
        """Height of the cosine."""
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """sqrt(warmup / (warmup + step)), after a warm-up of as many steps: the Transformer's (Vaswani et al. 2017).

    Its rate is dim^-0.5 * min(n^-0.5, n * warmup^-1.5) at step n = 1, 2, ..., with the peak (dim * warmup)^-0.5 at
    n = warmup: `Settings(lr=(dim * warmup) ** -0.5, warmup=warmup, schedule=InverseSqrt(warmup), min_lr=0)`.
    """

    warmup: int

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; at least 1 step is needed")

    def __call__(self, step: int, steps: int) -> float:
        """Height of the curve; the first step after the warm-up is one beyond the peak."""
        return math.sqrt(self.warmup / (self.warmup + step + 1))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak for most of the run, then a decay over the last steps (Hu et al. 2024, arXiv:2404.06395).

    A run stopped before its decay can be continued with more steps: the rates taken so far do not depend on the total.

    decay: how many steps the decay takes; a float below 1 is a share of the steps after the warm-up.
    shape: "linear", or "sqrt" for 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392).
    """

    decay: float = 0.2
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay is {self.decay}; a number of steps, or a share of them below 1, is needed")
        if self.decay >= 1 and self.decay != int(self.decay):
            raise ValueError(f"decay is {self.decay}; give whole steps, or a share of the steps below 1")
        if self.shape not in ("linear", "sqrt"):
            raise ValueError(unknown("shape", str(self.shape), ("linear", "sqrt")))

    def __call__(self, step: int, steps: int) -> float:
        """1 until the decay starts, then its height."""
        decay = min(steps, max(1, round(self.decay * steps)) if self.decay < 1 else int(self.decay))
        progress = (step - (steps - decay)) / decay
        if progress <= 0:
            return 1.0
        return 1.0 - (progress if self.shape == "linear" else math.sqrt(progress))


NAMED: dict[str, Schedule] = {
    "constant": Constant(),
    "linear": Linear(),
    "cosine": Cosine(),
    "wsd": WarmupStableDecay(),
}


def named(schedule: str | Schedule) -> Schedule:
    """Schedule a name stands for; a `Schedule` is returned as it is.

    Raises ValueError for an unknown name, TypeError for anything else.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(f"schedule is {schedule!r}; a name ({', '.join(NAMED)}) or a train.Schedule is needed")
    if schedule not in NAMED:
        raise ValueError(unknown("schedule", schedule, NAMED))
    return NAMED[schedule]
