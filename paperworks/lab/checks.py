"""Checks of a comparison: which arm must differ from which, on what quantity, by what margin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from statistics import fmean
from typing import Protocol

from paperworks.lab.values import shown

Numbers = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> metric -> one value a seed


class Check(Protocol):
    """A statement about the numbers of a comparison that says in one line how it came out."""

    @property
    def on(self) -> str:
        """The metric that is compared."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that are compared."""

    def passes(self, numbers: Numbers) -> bool:
        """Whether the check passes in the mean over the seeds."""

    def line(self, numbers: Numbers) -> str:
        """The check in words, with the number it came to."""


@dataclass(frozen=True)
class Beats:
    """The method is better than the control on a metric, by at least a margin; seeds are paired.

    Args:
        method, control: names of arms.
        on: the metric, as returned by the arms.
        by: the margin in the metric's unit.
        by_ratio: the margin as a share of the control's absolute value, instead of `by`.
        lower: lower values are better.
    """

    method: str
    control: str
    _: KW_ONLY
    on: str
    by: float | None = None
    by_ratio: float | None = None
    lower: bool = False

    def __post_init__(self) -> None:
        _check_pair(self.method, self.control)
        _check_margin(self, self.by, self.by_ratio)

    @property
    def arms(self) -> tuple[str, ...]:
        """Method and control."""
        return self.method, self.control

    @property
    def margin(self) -> float:
        """The stated margin, absolute or as a share of the control; 0 where none is stated."""
        return self.by_ratio if self.by_ratio is not None else self.by or 0.0

    def advantages(self, numbers: Numbers) -> list[float]:
        """How much better the method is than the control, for each seed; positive is better."""
        sign = -1 if self.lower else 1
        method, control = numbers[self.method][self.on], numbers[self.control][self.on]
        return [sign * (ours - theirs) for ours, theirs in zip(method, control, strict=True)]

    def passing_seeds(self, numbers: Numbers) -> list[bool]:
        """Whether the margin is reached, for each seed."""
        control = numbers[self.control][self.on]
        return [
            self._reached(advantage, theirs)
            for advantage, theirs in zip(self.advantages(numbers), control, strict=True)
        ]

    def passes(self, numbers: Numbers) -> bool:
        """Whether the margin is reached in the mean over the seeds."""
        return self._reached(fmean(self.advantages(numbers)), fmean(numbers[self.control][self.on]))

    def line(self, numbers: Numbers) -> str:
        """Such as "LoRA beats B never updated on loss by at least 0.3: 0.41 (3 of 3 seeds)"."""
        mean = fmean(self.advantages(numbers))
        came_to = shown(mean)
        if self.by_ratio is not None:
            control = abs(fmean(numbers[self.control][self.on]))
            came_to += f", {mean / control:.0%} of the control" if control else ", the control being 0"
        seeds = self.passing_seeds(numbers)
        return f"{self}: {came_to} ({sum(seeds)} of {len(seeds)} seeds)"

    def __str__(self) -> str:
        return f"{self.method} beats {self.control} on {self.on}{_by_at_least(self.by, self.by_ratio)}"

    def _reached(self, advantage: float, control: float) -> bool:
        if not self.margin:
            return advantage > 0
        return advantage >= (self.margin if self.by_ratio is None else self.margin * abs(control))


@dataclass(frozen=True)
class Within:
    """Two arms are equal on a metric, up to a stated margin.

    With `lower` given, the check has one side: the first arm is no worse than the second by more than the margin
    (non-inferiority).
    """

    method: str
    reference: str
    _: KW_ONLY
    on: str
    by: float | None = None
    by_ratio: float | None = None
    lower: bool | None = None

    def __post_init__(self) -> None:
        _check_pair(self.method, self.reference)
        _check_margin(self, self.by, self.by_ratio)
        if not (self.by or self.by_ratio):
            raise ValueError(
                f"Within({self.method!r}, {self.reference!r}, on={self.on!r}) states no margin; give by= or by_ratio= "
                "above 0"
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """Method and reference."""
        return self.method, self.reference

    def passes(self, numbers: Numbers) -> bool:
        """Whether the means differ by no more than the margin."""
        difference, reference = self._difference(numbers), fmean(numbers[self.reference][self.on])
        margin = self.by if self.by is not None else (self.by_ratio or 0.0) * abs(reference)
        return (abs(difference) if self.lower is None else difference if self.lower else -difference) <= margin

    def line(self, numbers: Numbers) -> str:
        """Such as "LoRA is within 0.1 of all weights on loss: 0.02"."""
        return f"{self}: {shown(self._difference(numbers))}"

    def __str__(self) -> str:
        margin = shown(self.by) if self.by is not None else f"{self.by_ratio or 0.0:.3g} of the value"
        if self.lower is None:
            return f"{self.method} is within {margin} of {self.reference} on {self.on}"
        return f"{self.method} is no worse than {self.reference} on {self.on} by more than {margin}"

    def _difference(self, numbers: Numbers) -> float:
        method, reference = numbers[self.method][self.on], numbers[self.reference][self.on]
        return fmean(ours - theirs for ours, theirs in zip(method, reference, strict=True))


@dataclass(frozen=True)
class AtLeast:
    """The mean of one arm on a metric is at least a value."""

    arm: str
    value: float
    _: KW_ONLY
    on: str

    @property
    def arms(self) -> tuple[str, ...]:
        """The one arm."""
        return (self.arm,)

    def passes(self, numbers: Numbers) -> bool:
        """Whether the mean reaches the value."""
        return fmean(numbers[self.arm][self.on]) >= self.value

    def line(self, numbers: Numbers) -> str:
        """Such as "accuracy of LoRA is at least 0.9: 0.95"."""
        return f"{self}: {shown(fmean(numbers[self.arm][self.on]))}"

    def __str__(self) -> str:
        return f"{self.on} of {self.arm} is at least {shown(self.value)}"


@dataclass(frozen=True)
class AtMost:
    """The mean of one arm on a metric is at most a value."""

    arm: str
    value: float
    _: KW_ONLY
    on: str

    @property
    def arms(self) -> tuple[str, ...]:
        """The one arm."""
        return (self.arm,)

    def passes(self, numbers: Numbers) -> bool:
        """Whether the mean stays below or at the value."""
        return fmean(numbers[self.arm][self.on]) <= self.value

    def line(self, numbers: Numbers) -> str:
        """Such as "loss of LoRA is at most 0.9: 0.85"."""
        return f"{self}: {shown(fmean(numbers[self.arm][self.on]))}"

    def __str__(self) -> str:
        return f"{self.on} of {self.arm} is at most {shown(self.value)}"


def _check_pair(first: str, second: str) -> None:
    if first == second:
        raise ValueError(f"arm {first!r} is compared with itself; name two different arms")


def _check_margin(check: Beats | Within, by: float | None, by_ratio: float | None) -> None:
    if by is not None and by_ratio is not None:
        raise ValueError(f"{type(check).__name__} has by={by} and by_ratio={by_ratio}; give one of them")
    for name, margin in (("by", by), ("by_ratio", by_ratio)):
        if margin is not None and not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"{type(check).__name__} has {name}={margin}; a margin is a finite number, 0 or above")


def _by_at_least(by: float | None, by_ratio: float | None) -> str:
    if by_ratio:
        return f" by at least {by_ratio:.3g} times the control" if by_ratio >= 1 else f" by at least {by_ratio:.1%}"
    return f" by at least {shown(by)}" if by else ""
