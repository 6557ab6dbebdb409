"""Bootstrap interval of a mean difference, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL = 0.95
RESAMPLES = 10_000  # the ends of the interval then move by about 1% of its width from one generator to another
FEWEST_SEEDS = 5  # fewer values have too few different resamples for a 95% interval


def paired_bootstrap(method: Sequence[float], control: Sequence[float]) -> dict[str, float]:
    """Mean of (method - control) over the seeds and its 95% percentile bootstrap interval; always the same numbers.

    Raises ValueError for fewer than five seeds.
    """
    import numpy

    if len(method) < FEWEST_SEEDS:
        raise ValueError(f"{len(method)} seeds are too few for an interval; it takes at least {FEWEST_SEEDS}")
    differences = numpy.asarray(method, dtype=float) - numpy.asarray(control, dtype=float)  # (seeds,)
    drawn = numpy.random.default_rng(0).integers(0, len(differences), size=(RESAMPLES, len(differences)))
    tail = 100 * (1 - LEVEL) / 2
    low, high = numpy.percentile(differences[drawn].mean(axis=1), [tail, 100 - tail])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}
