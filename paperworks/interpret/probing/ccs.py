"""Contrast-consistent search: a truth probe without labels (Burns, Ye, Klein & Steinhardt 2022, arXiv:2212.03827).

A statement and its opposite cannot both be true. CCS looks for a direction whose readings obey that. It is trained by
gradient descent, so what stands here is a module of probes and its loss; `train.fit` trains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.probing.labels import Labels, as_cases, as_truth
from paperworks.interpret.probing.probes import Probe, leading_component

Scaling = Literal["std", "mean", "none"]


@dataclass(frozen=True)
class Normalization:
    """phi(x) <- (phi(x) - mean) / scale, each side of the pairs with its own mean and scale.

    With both sides centred the token that makes the sides differ ("yes", "no") can no longer be read off.
    """

    positive_mean: Float[Tensor, " dim"]
    negative_mean: Float[Tensor, " dim"]
    positive_scale: Float[Tensor, " dim"]
    negative_scale: Float[Tensor, " dim"]

    @classmethod
    def of(
        cls, positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"], scaling: Scaling = "std"
    ) -> Normalization:
        """Measure pairs: "std" centres and scales each dimension (the paper), "mean" only centres, "none" neither."""
        if scaling not in get_args(Scaling):
            raise ValueError(unknown("scaling of contrast pairs", scaling, get_args(Scaling)))
        one, other = _sides(positive, negative)
        zero, unit = torch.zeros_like(one[0]), torch.ones_like(one[0])
        if scaling == "none":
            return cls(zero, zero, unit, unit)
        if scaling == "mean":
            return cls(one.mean(0), other.mean(0), unit, unit)
        return cls(one.mean(0), other.mean(0), _scale(one), _scale(other))

    def __call__(
        self, positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"]
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        """Both sides normalised, in float64."""
        one, other = _sides(positive, negative)
        return (one - self.positive_mean) / self.positive_scale, (other - self.negative_mean) / self.negative_scale


def _scale(side: Float[Tensor, "n dim"]) -> Float[Tensor, " dim"]:
    spread = side.std(0, correction=0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))  # a dimension that does not vary is 0 when centred


def _sides(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    one, other = as_cases(positive), as_cases(negative)
    if one.shape != other.shape:
        raise ValueError(
            f"contrast pairs need both sides of one shape (n, dim), got {tuple(one.shape)} and {tuple(other.shape)}"
        )
    return one, other


def consistency_loss(
    positive: Float[Tensor, "*probes n"], negative: Float[Tensor, "*probes n"]
) -> Float[Tensor, "*probes"]:
    """Mean [ (p(x+) - (1 - p(x-)))^2 + min(p(x+), p(x-))^2 ] for each probe: consistent, and confident.

    0 exactly when one side of every pair has probability 1 and the other 0; 1/4 for the probe that always says 1/2.
    """
    consistency = (positive - (1 - negative)).square()
    confidence = torch.minimum(positive, negative).square()
    return (consistency + confidence).mean(-1)


class ConsistencyProbes(nn.Module):
    """p(x) = sigmoid(theta . x + b) from several random starts, trained side by side as if each were alone.

    The loss has poor local optima, so the paper takes the best of 10 starts.
    """

    def __init__(self, dim: int, starts: int = 10) -> None:
        super().__init__()
        if min(dim, starts) < 1:
            raise ValueError(f"probes need at least one dimension and one start, got {dim} and {starts}")
        reach = dim**-0.5  # torch.nn.Linear's own bound, as in the authors' code
        self.weight = nn.Parameter(torch.empty(starts, dim).uniform_(-reach, reach))
        self.bias = nn.Parameter(torch.empty(starts).uniform_(-reach, reach))

    def forward(self, states: Float[Tensor, "n dim"]) -> Float[Tensor, "starts n"]:
        """Every probe's probability that each state is one of a true statement."""
        return torch.sigmoid(self.weight @ states.T + self.bias[:, None])

    @torch.no_grad()
    def losses(self, positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"]) -> Float[Tensor, " starts"]:
        """Each probe's loss on normalised pairs."""
        return consistency_loss(self(positive), self(negative))


def ccs_loss(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The loss of `ConsistencyProbes` on normalised pairs: summed over starts, so that each has its own."""
    return consistency_loss(model(pairs[0]), model(pairs[1])).sum()


@dataclass(frozen=True)
class ContrastProbe:
    """Tells from a pair whether its positive side is the true one: score > 0 says so.

    For CCS score = (p(x+) - p(x-)) / 2, which is the paper's (p(x+) + 1 - p(x-)) / 2 less 1/2; `squash` False leaves
    the sigmoid out, which makes score = theta . (x+ - x-) / 2 on normalised sides. The sign is free without labels.
    """

    direction: Float[Tensor, " dim"]
    normalization: Normalization
    bias: float = 0.0
    squash: bool = True

    def score(self, positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """One number a pair."""
        one, other = (side @ self.direction + self.bias for side in self.normalization(positive, negative))
        return (one.sigmoid() - other.sigmoid()) / 2 if self.squash else (one - other) / 2

    def __neg__(self) -> ContrastProbe:
        return ContrastProbe(-self.direction, self.normalization, -self.bias, self.squash)

    def signed_by(
        self, positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"], labels: Labels
    ) -> ContrastProbe:
        """The probe or its opposite, whichever agrees with more labels (True: the positive side is true)."""
        scores = self.score(positive, negative)
        agrees = ((scores > 0) == as_truth(labels, len(scores), both=False)).double().mean()
        return self if float(agrees) >= 0.5 else -self


def best_of(
    probes: ConsistencyProbes,
    normalization: Normalization,
    positive: Float[Tensor, "n dim"],
    negative: Float[Tensor, "n dim"],
) -> ContrastProbe:
    """The trained probe with the least loss on these pairs (given as recorded)."""
    one, other = (side.to(probes.weight) for side in normalization(positive, negative))
    best = int(probes.losses(one, other).argmin())
    return ContrastProbe(probes.weight[best].detach().double(), normalization, float(probes.bias[best].detach()))


def crc_tpc(
    positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"], scaling: Scaling = "std"
) -> ContrastProbe:
    """Contrastive representation clustering by the top principal component of x+ - x-, the paper's closed baseline."""
    normalization = Normalization.of(positive, negative, scaling)
    one, other = normalization(positive, negative)
    return ContrastProbe(leading_component(one - other), normalization, squash=False)


def crc_two_means(
    positive: Float[Tensor, "n dim"], negative: Float[Tensor, "n dim"], scaling: Scaling = "std", *, rounds: int = 100
) -> ContrastProbe:
    """Contrastive representation clustering by 2-means on x+ - x-: the direction joins the two centroids.

    Lloyd's iterations from the two sides of the top principal component: deterministic.
    """
    normalization = Normalization.of(positive, negative, scaling)
    one, other = normalization(positive, negative)
    apart = one - other
    direction = leading_component(apart)
    middle = (apart @ direction).median()
    inside = apart @ direction > middle
    for _ in range(rounds):
        if bool(inside.all()) or not bool(inside.any()):
            raise ValueError("2-means put every pair into one cluster: the differences of the pairs are all alike")
        first, second = apart[inside].mean(0), apart[~inside].mean(0)
        now = (apart - first).norm(dim=1) < (apart - second).norm(dim=1)
        if torch.equal(now, inside):
            break
        inside = now
    return ContrastProbe(first - second, normalization, -0.0, squash=False)


def on_statements(probe: ContrastProbe) -> Probe:
    """The contrast probe as one of single statements, whose own mean must be subtracted before.

    Raises:
        ValueError: where the sides were scaled differently, so that one direction does not serve both.
    """
    if not torch.equal(probe.normalization.positive_scale, probe.normalization.negative_scale):
        raise ValueError('the sides of this probe have different scales; fit it with scaling="mean" or "none"')
    return Probe(probe.direction / probe.normalization.positive_scale, probe.bias)
