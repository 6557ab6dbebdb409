"""A comparison: runs every arm over the seeds, judges the checks, keeps the value of each arm and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from paperworks.core.errors import unknown
from paperworks.lab.checks import Beats, Check, Within
from paperworks.lab.intervals import FEWEST_SEEDS, paired_bootstrap
from paperworks.lab.paper import Status, Verdict
from paperworks.lab.seeding import default_count, offsets, seed_everything
from paperworks.lab.stopwatch import Stopwatch
from paperworks.lab.values import plain_value, plain_values

if TYPE_CHECKING:
    from paperworks.lab.workbench import Lab

Arm = Callable[[int], Mapping[str, float | list[float]]]

MOST_POINTS = 200  # of a stored curve: more than a figure of the report can show


@dataclass(kw_only=True)
class Comparison:
    """What the arms returned: numbers and curves for each seed, in the order of the seeds."""

    control: str
    seeds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each arm, on the last seed
    numbers: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # arm -> metric -> value a seed
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)  # arm -> metric -> curve a seed

    def add(self, arm: str, seed: int, returned: object) -> None:
        """Add what an arm returned for a seed.

        Raises ValueError where it is not a mapping of finite numbers and lists of them, or has other metrics than
        the arms before it.
        """
        if not isinstance(returned, Mapping) or not returned:
            raise ValueError(f"arm {arm!r} returned {returned!r}; return its metrics, such as {{'loss': 0.4}}")
        numbers: dict[str, float] = {}
        curves: dict[str, list[float]] = {}
        for metric, value in returned.items():
            plain = _numeric(value, f"{arm}, seed {seed}, {metric}")
            if isinstance(plain, list):
                curves[str(metric)] = plain
            else:
                numbers[str(metric)] = plain
        self._check_metrics(arm, numbers, curves)
        for metric, value in numbers.items():
            self.numbers.setdefault(arm, {}).setdefault(metric, []).append(value)
        for metric, points in curves.items():
            self.curves.setdefault(arm, {}).setdefault(metric, []).append(points)
        self.numbers.setdefault(arm, {})

    def _check_metrics(self, arm: str, numbers: Mapping[str, object], curves: Mapping[str, object]) -> None:
        if not self.numbers:
            return
        first = next(iter(self.numbers))
        known = (set(self.numbers[first]), set(self.curves.get(first, {})))
        if (set(numbers), set(curves)) != known:
            raise ValueError(
                f"arm {arm!r} returned the numbers {sorted(numbers)} and the curves {sorted(curves)}, "
                f"arm {first!r} {sorted(known[0])} and {sorted(known[1])}; every arm returns the same metrics"
            )

    def averaged_curves(self) -> dict[str, dict[str, list[float]]]:
        """Curves averaged over the seeds, at most MOST_POINTS points each; arm -> metric -> points."""
        return {
            arm: {metric: thinned(mean_curve(runs)) for metric, runs in metrics.items()}
            for arm, metrics in self.curves.items()
        }


def compare(
    lab: Lab,
    *,
    arms: Mapping[str, Arm],
    main: Beats,
    also: Sequence[Check] = (),
    seeds: int | Sequence[int] | None = None,
    measured: Mapping[str, object] | None = None,
    note: str = "",
) -> tuple[Verdict, Comparison]:
    """Run the arms and judge the checks; see `Lab.compare`."""
    check_design(arms, main, also)
    comparison = Comparison(control=main.control)
    for offset in _planned(lab, comparison, seeds):
        seed = lab.seed + offset
        comparison.seconds.clear()
        for arm, function in arms.items():
            watch = Stopwatch()
            _run_arm(lab, comparison, arm, function, seed)
            comparison.seconds.append(watch.seconds())
            if not comparison.seeds:
                _check_metrics_exist(comparison, arm, (main, *also))
        comparison.seeds.append(seed)
    return _judged(comparison, main, also, measured or {}, note), comparison


def _planned(lab: Lab, comparison: Comparison, seeds: int | Sequence[int] | None) -> Iterator[int]:
    """Seeds to run, as offsets from the first.

    How many is decided by the slowest arm: after the first seed, and again after the second, since the first run of
    an arm may have loaded libraries and data.
    """
    if seeds is not None:
        yield from offsets(seeds)[: lab.most_seeds]
        return
    count = 2
    offset = 0
    while offset < (count if lab.most_seeds is None else min(count, lab.most_seeds)):
        yield offset
        offset += 1
        if offset <= 2:
            count = default_count(max(comparison.seconds))


def _run_arm(lab: Lab, comparison: Comparison, arm: str, function: Arm, seed: int) -> None:
    with lab.board.task(f"{arm}, seed {seed}", None):
        seed_everything(seed)
        comparison.add(arm, seed, function(seed))


def check_design(arms: Mapping[str, Arm], main: object, also: Sequence[Check]) -> None:
    """Raises ValueError for a comparison that cannot bind: no control, no margin, a check of an unknown arm."""
    if not isinstance(main, Beats):
        hint = " (put it into also=)" if isinstance(main, Within) else ""
        raise ValueError(
            f"main is {main!r}; the main check is Beats(method, control, on=..., by=...): better than a control by a "
            f"margin stated beforehand{hint}"
        )
    if not main.margin > 0:
        raise ValueError(f"main check {str(main)!r} has no margin; state by= or by_ratio= above 0")
    if len(arms) < 2:
        raise ValueError(f"a comparison needs at least two arms, a method and a control; got {sorted(arms)}")
    for check in (main, *also):
        for arm in check.arms:
            if arm not in arms:
                raise ValueError(f"check {str(check)!r}: {unknown('arm', arm, arms)}")


def _check_metrics_exist(comparison: Comparison, arm: str, checks: Sequence[Check]) -> None:
    known, curves = comparison.numbers[arm], comparison.curves.get(arm, {})
    for check in checks:
        if check.on in curves:
            raise ValueError(f"check {str(check)!r}: {check.on!r} is a curve; a check takes one number a seed")
        if check.on not in known:
            raise ValueError(f"check {str(check)!r}: {unknown('metric', check.on, known)}")


def _judged(
    comparison: Comparison, main: Beats, also: Sequence[Check], measured: Mapping[str, object], note: str
) -> Verdict:
    numbers = comparison.numbers
    others = [check.passes(numbers) for check in also]
    status: Status = "not reproduced"
    if main.passes(numbers):
        status = "holds" if all(main.passing_seeds(numbers)) and all(others) else "partly"
    # Every seed may pass while the mean does not: a relative margin on values of different sign.
    checks = {main.line(numbers): main.passes(numbers) and all(main.passing_seeds(numbers))}
    checks |= {check.line(numbers): passed for check, passed in zip(also, others, strict=True)}
    means: dict[str, object] = {}
    control: dict[str, object] = {}
    for check in (main, *also):
        for arm in check.arms:
            side = control if arm == main.control else means
            side[f"{check.on}, {arm}"] = fmean(numbers[arm][check.on])
    method, against = numbers[main.method][main.on], numbers[main.control][main.on]
    interval = None
    if len(comparison.seeds) >= FEWEST_SEEDS:
        interval = paired_bootstrap(method, against)
    return Verdict(
        status=status,
        measured=plain_values({**means, **measured}),
        control=plain_values(control),
        checks=checks,
        note=note,
        seeds=tuple(comparison.seeds),
        arms={arm: dict(metrics) for arm, metrics in numbers.items()},
        curves=comparison.averaged_curves(),
        interval=interval,
        difference=f"{main.on}, {main.method} - {main.control}",
    )


def mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds at each point, as far as the shortest run goes."""
    return [fmean(values) for values in zip(*runs, strict=False)]


def thinned(points: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """At most `most` of the points, evenly spaced, the first and the last always kept."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _numeric(value: object, name: str) -> float | list[float]:
    plain = plain_value(value, name)
    if isinstance(plain, list):
        if not plain:
            raise ValueError(f"{name!r} is an empty list; a curve has at least one point")
        if not all(isinstance(point, int | float) for point in plain):
            raise ValueError(f"{name!r} is {plain!r}; a curve is a flat list of numbers")
        return [float(point) for point in plain if isinstance(point, int | float)]
    if isinstance(plain, str):
        raise ValueError(f"{name!r} is {plain!r}; an arm returns numbers and lists of numbers")
    return float(plain)
