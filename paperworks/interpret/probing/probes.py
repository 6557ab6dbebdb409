"""Linear probes: what a direction of activation space says about a label.

Every probe is `fit(activations (n, dim), labels (n,)) -> Probe`; a `Probe` scores new activations, positive for the
class, and has a `direction`. Fits are closed or convex, in float64, and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.probing.labels import Labels, as_cases, as_truth

_MOST_STEPS = 200  # Newton needs about ten where the classes overlap, some forty where they are far apart


@dataclass(frozen=True)
class Probe:
    """score(a) = direction . a + bias: positive for the class, negative outside it. float64, not normalised."""

    direction: Float[Tensor, " dim"]
    bias: float = 0.0

    def score(self, activations: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n"]:
        """Direction . a + bias for each activation, in float64."""
        if activations.shape[-1:] != self.direction.shape:
            raise ValueError(
                f"this probe reads activations of {len(self.direction)} dimensions, got {tuple(activations.shape)}"
            )
        return activations.detach().to(self.direction) @ self.direction + self.bias

    def predict(self, activations: Float[Tensor, "*n dim"]) -> Tensor:
        """Whether each activation is on the class's side (bool)."""
        return self.score(activations) > 0

    @property
    def unit(self) -> Float[Tensor, " dim"]:
        """The direction at length 1."""
        out: Tensor = self.direction / self.direction.norm()
        return out

    def __neg__(self) -> Probe:
        return Probe(-self.direction, -self.bias)


Fit = Callable[[Tensor, Tensor], Probe]


def class_means(
    activations: Float[Tensor, "n dim"], labels: Labels
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """The mean activation of the class, and of the rest."""
    cases = as_cases(activations)
    truth = as_truth(labels, len(cases))
    return cases[truth].mean(0), cases[~truth].mean(0)


def within_covariance(activations: Float[Tensor, "n dim"], labels: Labels) -> Float[Tensor, "dim dim"]:
    """The covariance around each class's own mean, pooled: sum (a - mean)(a - mean)^T / n."""
    cases = as_cases(activations)
    truth = as_truth(labels, len(cases))
    inside, outside = class_means(cases, truth)
    apart = cases - torch.where(truth[:, None], inside, outside)
    return apart.T @ apart / len(cases)


def mass_mean(activations: Float[Tensor, "n dim"], labels: Labels) -> Probe:
    """Difference of means: direction = mean of the class - mean of the rest (Marks & Tegmark 2023, arXiv:2310.06824).

    The bias puts 0 half-way between the two means.
    """
    inside, outside = class_means(activations, labels)
    direction = inside - outside
    return Probe(direction, -float(direction @ (inside + outside)) / 2)


def lda(activations: Float[Tensor, "n dim"], labels: Labels, *, shrinkage: float = 1e-3) -> Probe:
    """Mass-mean with covariance, Fisher's linear discriminant: direction = S^-1 (mean of the class - mean of the rest).

    S is the pooled covariance within classes, mixed as (1 - shrinkage) S + shrinkage (trace S / dim) I, without which
    fewer cases than dimensions have no inverse. The bias puts 0 half-way between the means: priors count as equal.

    Raises:
        ValueError: shrinkage outside [0, 1], or S without an inverse.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage mixes the covariance with a multiple of 1: it lies in [0, 1], got {shrinkage}")
    inside, outside = class_means(activations, labels)
    covariance = within_covariance(activations, labels)
    dim = len(inside)
    mixed = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / dim * torch.eye(dim).to(covariance)
    factor, failed = torch.linalg.cholesky_ex(mixed)
    if int(failed) or not bool(factor.diagonal().min() > 1e-12 * factor.diagonal().max()):
        raise ValueError(
            f"the covariance of {len(activations)} cases in {dim} dimensions has no inverse: raise shrinkage above "
            f"{shrinkage:g}, or drop dimensions that do not vary"
        )
    direction = torch.cholesky_solve((inside - outside)[:, None], factor)[:, 0]
    return Probe(direction, -float(direction @ (inside + outside)) / 2)


def logistic(
    activations: Float[Tensor, "n dim"],
    labels: Labels,
    *,
    penalty: float = 1.0,
    intercept: bool = True,
    tolerance: float = 1e-9,
) -> Probe:
    """Logistic regression at its optimum: the w, b that make least

        sum_i log(1 + exp(-y_i (w . a_i + b))) + penalty / 2 ||w||^2,   y_i = +1 in the class, -1 outside it.

    `penalty` is scikit-learn's 1 / C; b is not penalised. Solved by damped Newton steps: in the span of the
    activations, where w must lie, so that few cases in many dimensions are cheap.

    Args:
        activations: (n, dim); they are used as they are: centre or scale them first where that is wanted.
        labels: (n,), booleans or 0 and 1.
        penalty: above 0; classes that can be separated have no optimum without it.
        intercept: whether there is a bias b; without one, score(-a) = -score(a).
        tolerance: the gradient's largest entry at the optimum, relative to the one at w = 0.

    Raises:
        ValueError: penalty not above 0, labels that are not of two classes, or (numbers of hopeless scale) no optimum.
    """
    if not penalty > 0:
        raise ValueError(
            f"penalty must be above 0, got {penalty}: without it, classes that can be separated have no optimum; "
            "use 1e-6 for nearly none"
        )
    cases = as_cases(activations)
    sign = as_truth(labels, len(cases)).double() * 2 - 1
    if len(cases) < cases.shape[1]:  # w = Q u with cases^T = Q R: same scores, same norm, fewer unknowns
        basis, _ = torch.linalg.qr(cases.T)
        weight, bias = _newton(cases @ basis, sign, penalty, intercept, tolerance)
        return Probe(basis @ weight, bias)
    return Probe(*_newton(cases, sign, penalty, intercept, tolerance))


def _newton(
    x: Float[Tensor, "n dim"], sign: Float[Tensor, " n"], penalty: float, intercept: bool, tolerance: float
) -> tuple[Float[Tensor, " dim"], float]:
    """Minimise the penalised logistic loss by Newton steps, halved until the loss falls enough (Armijo)."""
    dim = x.shape[1]
    columns = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if intercept else x
    ridge = torch.full((columns.shape[1],), penalty).to(x)
    ridge[dim:] = 0.0

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-sign * (columns @ w)).sum() + (ridge * w.square()).sum() / 2

    def gradient(w: Tensor) -> Tensor:
        return ridge * w - columns.T @ (sign * torch.sigmoid(-sign * (columns @ w)))

    w = torch.zeros_like(ridge)
    now, slope = loss(w), gradient(w)
    target = tolerance * float(slope.abs().max().clamp_min(1e-300))
    for _ in range(_MOST_STEPS):
        if float(slope.abs().max()) <= target:
            return w[:dim], float(w[dim]) if intercept else 0.0
        chance = torch.sigmoid(columns @ w)
        curvature = (columns * (chance * (1 - chance))[:, None]).T @ columns + torch.diag(ridge)
        # A relative 1e-14 keeps the bias's entry invertible where every chance is 0 or 1.
        curvature.diagonal().add_(1e-14 * curvature.diagonal().max())
        step = -torch.linalg.solve(curvature, slope)
        length, falls = 1.0, float(slope @ step)
        while not bool(loss(w + length * step) <= now + 1e-4 * length * falls + 1e-15 * now.abs()) and length > 1e-10:
            length /= 2
        if length <= 1e-10:
            break
        w = w + length * step
        now, slope = loss(w), gradient(w)
    if float(slope.abs().max()) <= 1e3 * target:  # rounding ends the descent a little early
        return w[:dim], float(w[dim]) if intercept else 0.0
    raise ValueError(
        f"logistic regression found no optimum: the gradient is still {float(slope.abs().max()):.1e} (wanted "
        f"{target:.1e}); scale the activations (largest entry {float(x.abs().max()):.1e}) or raise "
        f"penalty ({penalty:g})"
    )


def principal_components(
    rows: Float[Tensor, "n dim"], count: int, *, center: bool = True
) -> Float[Tensor, "count dim"]:
    """The unit directions of largest variance (or, not centred, second moment), in descending order, in float64.

    Their signs are arbitrary.

    Raises:
        ValueError: when the rows do not have so many directions.
    """
    cases = as_cases(rows)
    if center:
        cases = cases - cases.mean(0)
    _, values, directions = torch.linalg.svd(cases, full_matrices=False)
    if not bool(values[0] > 0):
        raise ValueError("the rows are all alike: there is no direction in which they vary")
    rank = int((values > values[0] * 1e-10).sum())
    if not 1 <= count <= rank:
        raise ValueError(
            f"these {len(cases)} rows have {rank} principal components, so count is 1 to {rank}, got {count}"
        )
    out: Tensor = directions[:count]
    return out


def leading_component(rows: Float[Tensor, "n dim"], *, center: bool = True) -> Float[Tensor, " dim"]:
    """The first of the `principal_components`."""
    return principal_components(rows, 1, center=center)[0]


def random_probe(dim: int, seed: int) -> Probe:
    """A unit direction drawn uniformly, the control of every probe."""
    drawn = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Probe(drawn / drawn.norm())
