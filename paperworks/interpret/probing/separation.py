"""How well a score separates two classes, and how sure one may be of it: AUROC, accuracy, confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.interpret.probing.labels import as_truth

Z95 = 1.959963984540054  # the normal quantile that leaves 2.5% on each side


@dataclass(frozen=True)
class Estimate:
    """A measured share with its 95% interval and the number of cases it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.n}"


def auroc(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"] | Int[Tensor, " n"] | Float[Tensor, " n"]) -> float:
    """The chance that a case of the class scores above one outside it, ties counting half.

    Computed from ranks: (R - m (m + 1) / 2) / (m k) for the rank sum R of the m cases of the class, k outside it
    (Mann & Whitney 1947). 0.5 is what a coin has; reversing the scores gives 1 minus it.

    Raises:
        ValueError: when a class is missing, the lengths differ or a score is not finite.
    """
    truth = as_truth(labels, len(scores))
    values = scores.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("a score is not finite: ranks need numbers that can be ordered")
    rank = ranks(values)
    inside = int(truth.sum())
    outside = len(values) - inside
    return float((rank[truth].sum() - inside * (inside + 1) / 2) / (inside * outside))


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each value's rank from 1, in float64; equal values share the mean of their ranks."""
    _, place, count = values.detach().unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    out: Tensor = (last - (count.double() - 1) / 2)[place]
    return out


def rank_correlation(one: Sequence[float] | Float[Tensor, " n"], other: Sequence[float] | Float[Tensor, " n"]) -> float:
    """Spearman's correlation: Pearson's of the ranks, 1 where both lists order alike.

    Raises:
        ValueError: for lists of unequal length, or one whose values are all equal.
    """
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (one, other))
    if first.shape != second.shape or first.dim() != 1:
        raise ValueError(f"a rank correlation takes two lists of one length, got {len(first)} and {len(second)}")
    if any(bool((values == values[0]).all()) for values in (first, second)):
        raise ValueError("the values of a list are all equal (or it has one): there is no order to compare")
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def wilson(correct: int, n: int) -> Estimate:
    """A share with Wilson's score interval, which stays within [0, 1] (Wilson 1927)."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"a share needs 0 <= correct <= n and n >= 1, got {correct} of {n}")
    share = correct / n
    scale = 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / scale
    reach = Z95 / scale * (share * (1 - share) / n + Z95**2 / (4 * n**2)) ** 0.5
    # At 0 and 1 one bound is the share itself, but for rounding.
    return Estimate(share, min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach)), n)


def accuracy(
    scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"] | Int[Tensor, " n"] | Float[Tensor, " n"]
) -> Estimate:
    """The share of cases on the right side of 0, with Wilson's interval."""
    truth = as_truth(labels, len(scores), both=False)
    return wilson(int(((scores > 0) == truth).sum()), len(scores))


def bootstrap(
    statistic: Callable[[Tensor], float], groups: Int[Tensor, " n"] | int, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """statistic(rows) for all rows, with the 2.5% and 97.5% quantiles over resampled rows.

    Args:
        statistic: takes row indices (int64, with repetitions) and returns a number; rows drawn for which it raises
            ValueError (a class went missing) are drawn again.
        groups: the number of rows, or a group for each row: groups are then drawn whole (clustered data).
        draws: how many resamples.
        seed: of the draws.
    """
    if draws < 2:
        raise ValueError(f"a bootstrap needs at least 2 draws, got {draws}")
    named = torch.arange(groups) if isinstance(groups, int) else groups
    members = [(named == name).nonzero().flatten() for name in named.unique()]
    if not members:
        raise ValueError("there are no rows to resample")
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    failures = 0
    while len(values) < draws:
        picked = torch.randint(len(members), (len(members),), generator=generator).tolist()
        try:
            values.append(statistic(torch.cat([members[index] for index in picked])))
        except ValueError:
            failures += 1
            if failures > draws:
                raise
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return Estimate(statistic(torch.arange(len(named))), low, high, len(named))
