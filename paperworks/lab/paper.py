"""A paper as an experiment: what it claims, and the function that checks each claim."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from paperworks.core.errors import unknown
from paperworks.lab.values import Value, plain_values

if TYPE_CHECKING:
    from paperworks.lab.workbench import Lab

Kind = Literal["behaviour", "exact", "parity"]
Reach = Literal["exact", "parity", "real", "small", "full"]
BEHAVIOUR_REACHES = ("small", "real", "full")

# "one seed": a behaviour judged on one seed, which binds nobody; "ran": at the smoke scale, which judges nothing.
Status = Literal["holds", "partly", "not reproduced", "one seed", "not run", "ran"]

MOST_USAGE_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a claim: a status, the numbers behind it and those of the control.

    A verdict of `Lab.compare` also has the seeds, the numbers of each arm and seed, the curves averaged over the
    seeds, and from five seeds on the interval of the difference between method and control.
    """

    status: Status
    measured: dict[str, Value] = field(default_factory=dict)
    control: dict[str, Value] | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    note: str = ""
    seeds: tuple[int, ...] = ()  # empty where the claim was not judged over seeds
    arms: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # arm -> metric -> value a seed
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # arm -> metric -> points
    difference: str = ""  # what the interval is of: "loss, LoRA - B never updated"
    interval: dict[str, float] | None = None  # mean, low, high

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(unknown("verdict", self.status, get_args(Status)))
        object.__setattr__(self, "measured", plain_values(self.measured))
        if self.control is not None:
            object.__setattr__(self, "control", plain_values(self.control))

    @classmethod
    def of(
        cls,
        checks: Mapping[str, object],
        measured: Mapping[str, object],
        control: Mapping[str, object] | None = None,
        note: str = "",
    ) -> Verdict:
        """Derive the status from the checks; the check named first is the main effect.

        All true: holds. Main effect false: not reproduced. Main effect true, another false: partly.
        """
        if not checks:
            raise ValueError("a verdict needs at least one check; name first the one that is the main effect")
        named = plain_values(checks)
        for name, passed in named.items():
            if not isinstance(passed, bool):
                raise TypeError(f"check {name!r} is {passed!r}; a check is True or False")
        passes = {name: bool(passed) for name, passed in named.items()}
        main_effect = next(iter(passes.values()))
        status: Status = "holds" if all(passes.values()) else "partly" if main_effect else "not reproduced"
        return cls(
            status=status,
            measured=plain_values(measured),
            control=None if control is None else plain_values(control),
            checks=passes,
            note=note,
        )


Check = Callable[["Lab"], Verdict]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, with its place in the paper and the function that checks it here."""

    name: str
    statement: str
    paper: str  # what the paper says, with its place (table, figure, section)
    kind: Kind
    reach: Reach = "small"  # exact, parity; behaviours: real weights or data, small ones, or the paper's own in full
    control: str | None  # the same experiment with the key ingredient removed or replaced
    tour: int | None  # position in the tour, None when not in it
    check: Check = field(repr=False, compare=False)

    def examine(self, lab: Lab) -> Verdict:
        """Run the check and refuse a verdict that is not one, or a behaviour that was compared with nothing."""
        verdict = self.check(lab)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"claim {self.name!r} returned {verdict!r}; return lab.compare(...) or lab.judge(...)")
        if self.kind == "behaviour" and verdict.status != "not run" and not verdict.control:
            raise ValueError(f"claim {self.name!r} is a behaviour but measured no control; use lab.compare")
        return verdict


@dataclass(frozen=True, kw_only=True)
class Paper:
    """An entry of the reading list; its claims are attached by the decorator `claim`."""

    key: str
    title: str
    authors: str
    year: int
    ref: str
    family: str
    summary: str
    implements: tuple[str, ...]  # dotted names of the parts this paper contributes
    equation: str = ""  # LaTeX, for the paper's page
    usage: str = ""  # at most 15 lines of Python that apply the paper to a real model through the public API
    notes: str = ""  # what a reader should know beside the claims: limits, deviations
    budget_exception: str = ""  # why the claims take longer than 6 minutes at the small scale
    claims: list[Claim] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lines = self.usage.strip().count("\n") + 1
        if lines > MOST_USAGE_LINES:
            raise ValueError(
                f"usage of paper {self.key!r} has {lines} lines; {MOST_USAGE_LINES} at most, so that a reader sees the "
                "method at once"
            )

    def claim(
        self,
        statement: str,
        *,
        paper: str,
        kind: Kind = "behaviour",
        reach: Reach | None = None,
        control: str | None = None,
        tour: int | None = None,
    ) -> Callable[[Check], Check]:
        """Attach the decorated function as a claim of this paper.

        Args:
            statement: what the paper claims.
            paper: the paper's own number, with its place (table, figure, section).
            kind: behaviour (arms over seeds), exact (an identity) or parity (equal to another implementation).
            reach: how far the evidence of a behaviour reaches: "small" (a model or task made small for it), "real"
                (real weights or data) or "full" (the paper's data and size).
            control: the same experiment with the key ingredient removed or replaced.
            tour: position in the tour.

        Raises ValueError for an unknown kind or reach, a behaviour without a control, or a name that is taken.
        """
        if kind not in get_args(Kind):
            raise ValueError(unknown("kind of evidence", kind, get_args(Kind)))
        reached = reach_of(kind, reach)
        if kind == "behaviour" and not control:
            raise ValueError(
                f"claim {statement!r} of {self.key!r} is a behaviour, so it needs control=: the same experiment with "
                "the key ingredient removed or replaced by the paper's baseline"
            )

        def attach(check: Check) -> Check:
            name = check.__name__
            if any(claim.name == name for claim in self.claims):
                raise ValueError(f"paper {self.key!r} already has a claim named {name!r}; give this one another name")
            self.claims.append(
                Claim(
                    name=name,
                    statement=statement,
                    paper=paper,
                    kind=kind,
                    reach=reached,
                    control=control,
                    tour=tour,
                    check=check,
                )
            )
            return check

        return attach

    @property
    def source(self) -> Path:
        """The file that states the claims."""
        if not self.claims:
            raise ValueError(f"paper {self.key!r} has no claims yet, so there is nothing to run")
        # A decorator such as torch.no_grad() would be found in its own file.
        return Path(inspect.unwrap(self.claims[0].check).__code__.co_filename)


def reach_of(kind: Kind, reach: Reach | None) -> Reach:
    """How far the evidence of a claim reaches: exact and parity follow the kind, a behaviour is small by default.

    Raises ValueError for a reach that the kind does not have.
    """
    if kind != "behaviour":
        if reach not in (None, kind):
            raise ValueError(f"a claim of kind {kind!r} has reach {kind!r}, not {reach!r}; leave reach= out")
        return kind
    if reach is None:
        return "small"
    if reach not in BEHAVIOUR_REACHES:
        raise ValueError(unknown("reach of a behaviour", reach, BEHAVIOUR_REACHES))
    return reach
