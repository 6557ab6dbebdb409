"""Figures of a comparison: curves with a band over the seeds, and dots of arms over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING

from paperworks.core.errors import unknown
from paperworks.lab.compare import Comparison, mean_curve, thinned
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.lab.values import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE_WIDTH = 52  # characters that fit beside the longest names of arms
LINES = ("-", "--", ":")  # of the first, second and third curve of an arm


def arm_colors(comparison: Comparison) -> dict[str, str]:
    """Colour of each arm; grey is for the control."""
    colors = cycle(COLORS)
    return {arm: CONTROL if arm == comparison.control else next(colors) for arm in comparison.numbers}


def draw_curves(
    axes: Axes,
    comparison: Comparison,
    on: Sequence[str],
    *,
    x: str | None = None,
    arms: Sequence[str] | None = None,
    title: str = "",
    log: str = "",
) -> None:
    """Draw the mean of curves over the seeds for each arm, with a band from the lowest to the highest value.

    Raises ValueError for no curve, or an arm or curve that the comparison does not have.
    """
    if set(log) - {"x", "y"}:
        raise ValueError(f"log is {log!r}; name the axes: 'x', 'y' or 'xy'")
    if not on:
        raise ValueError("name at least one curve that the arms return")
    colors = arm_colors(comparison)
    for arm in arms or list(colors):
        if arm not in colors:
            raise ValueError(unknown("arm", arm, colors))
        for curve, line in zip(on, cycle(LINES), strict=False):
            places, runs = _points(comparison, arm, curve, x)
            mean, lowest, highest = (thinned([of(values) for values in runs]) for of in (fmean, min, max))
            across = thinned(places)
            axes.fill_between(across, lowest, highest, color=colors[arm], alpha=0.18, linewidth=0)
            axes.plot(across, mean, line, color=colors[arm], label=arm if len(on) == 1 else f"{arm}: {curve}")
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_xlabel(x or "")
    seeds = len(comparison.seeds)
    words = title or " and ".join(on)
    _set_title(axes, f"{words}, mean and range of {seeds} seeds" if seeds > 1 else words)
    axes.legend()


def _points(comparison: Comparison, arm: str, curve: str, x: str | None) -> tuple[list[float], list[tuple[float, ...]]]:
    """Places on the horizontal axis, and at each the values of all seeds, as far as the shortest run goes."""
    metrics = comparison.curves.get(arm, {})
    for name in (curve, x) if x is not None else (curve,):
        if name not in metrics:
            raise ValueError(unknown("curve", name, metrics))
    runs = list(zip(*metrics[curve], strict=False))
    places = mean_curve(metrics[x]) if x is not None else [float(place) for place in range(1, len(runs) + 1)]
    shared = min(len(places), len(runs))
    return places[:shared], runs[:shared]


def draw_points(axes: Axes, comparison: Comparison, on: str, *, title: str = "", log: bool = False) -> None:
    """Draw one row an arm with one dot a seed, the mean written above it.

    Raises ValueError for a metric that the comparison does not have.
    """
    for row, (arm, color) in enumerate(arm_colors(comparison).items()):
        metrics = comparison.numbers[arm]
        if on not in metrics:
            raise ValueError(unknown("metric", on, metrics))
        values = metrics[on]
        axes.plot(values, [row] * len(values), "o", color=color, markersize=8, alpha=0.7)
        axes.text(fmean(values), row - 0.3, shown(fmean(values)), color=INK, ha="center", va="center")
    if log:
        axes.set_xscale("log")
    axes.set_yticks(range(len(comparison.numbers)), list(comparison.numbers))
    axes.set_ylim(len(comparison.numbers) - 0.5, -0.7)
    axes.margins(x=0.1)
    axes.set_xlabel(on)
    seeds = len(comparison.seeds)
    _set_title(axes, f"{title or on}, one dot a seed" if seeds > 1 else title or on)


def _set_title(axes: Axes, title: str) -> None:
    """Set a title in as many lines as it needs beside the labels of the arms."""
    axes.set_title(textwrap.fill(title, TITLE_WIDTH))
