"""Hierarchical mixtures of experts, fitted by expectation-maximization (Jordan & Jacobs 1994)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.spec import Spec

SMALLEST_VARIANCE = 1e-6  # an expert left with the points it meets exactly must not collapse onto them
HALVINGS = 20  # of a Newton step that would lower its objective


@dataclass(frozen=True, kw_only=True)
class HME(Spec):
    """P(y | x) = sum over leaves of (product of the gates on the way) * P_leaf(y | x), gates softmax(V x).

    A constant 1 is appended to x.

    Attributes:
        inputs: numbers in x; outputs: numbers in y.
        branching: children of a node at each level: (2, 2) is the paper's tree of two levels and four experts, (4,) a
            flat mixture, () one expert.
        family: what experts are: "gaussian", y = U x + noise of the expert's own variance by output; or "bernoulli",
            P(y = 1) = sigmoid(U x), outputs independent.
        noise: a fixed standard deviation of Gaussian experts, or None to estimate it.
        ridge: precision of a Gaussian prior on all gates and experts, which keeps gates finite when data separate.
    """

    inputs: int
    outputs: int
    branching: tuple[int, ...] = (2, 2)
    family: Literal["gaussian", "bernoulli"] = "gaussian"
    noise: float | None = None
    ridge: float = 1e-3

    def validate(self) -> None:
        """Check sizes, the noise and the ridge."""
        for name in ("inputs", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"HME.{name} must be at least 1, got {getattr(self, name)}")
        if any(children < 2 for children in self.branching):
            raise ValueError(f"HME.branching needs at least 2 children a node, got {self.branching}; () is one expert")
        if self.noise is not None and self.noise <= 0:
            raise ValueError(f"HME.noise must be positive, or None to estimate it, got {self.noise}")
        if self.noise is not None and self.family != "gaussian":
            raise ValueError(f"HME.noise is of Gaussian experts; family is {self.family!r}")
        if self.ridge <= 0:
            raise ValueError(f"HME.ridge must be positive (gates of separable data diverge without), got {self.ridge}")

    @property
    def leaves(self) -> int:
        """Number of experts."""
        return math.prod(self.branching)

    def build(self) -> HMEModel:
        """A tree with random gates and experts (use `torch.manual_seed` for reproducible ones)."""
        return HMEModel(self)


class HMEModel(nn.Module):
    """The module of `HME`; its parameters can be fitted by `fit_hme`, or by gradients of `log_likelihood`."""

    def __init__(self, spec: HME) -> None:
        super().__init__()
        self.spec = spec
        width = spec.inputs + 1
        nodes = [math.prod(spec.branching[:level]) for level in range(len(spec.branching))]
        self.gates = nn.ParameterList(
            [nn.Parameter(torch.randn(n, b, width)) for n, b in zip(nodes, spec.branching, strict=True)]
        )
        self.experts = nn.Parameter(0.1 * torch.randn(spec.leaves, spec.outputs, width))
        start = 1.0 if spec.noise is None else spec.noise**2
        self.log_variance = nn.Parameter(
            torch.full((spec.leaves, spec.outputs), math.log(start)),
            requires_grad=spec.noise is None and spec.family == "gaussian",
        )

    def log_gates(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch leaves"]:
        """Each leaf's log prior: the sum of log gates from the root to it."""
        wide = _with_one(x)
        total = x.new_zeros(len(x), 1)
        for gate in self.gates:
            each = torch.einsum("ncd,bd->bnc", gate, wide).log_softmax(-1)
            total = (total[..., None] + each).flatten(1)
        return total

    def log_density(
        self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, "batch leaves"]:
        """log P_leaf(y | x)."""
        link = torch.einsum("lod,bd->blo", self.experts, _with_one(x))
        if self.spec.family == "bernoulli":
            return -F.binary_cross_entropy_with_logits(link, y[:, None].expand_as(link), reduction="none").sum(-1)
        squares = (y[:, None] - link).square() / self.log_variance.exp()
        return -(squares + self.log_variance + math.log(2 * math.pi)).sum(-1) / 2

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """The mean of y: the experts' means weighted by the gates."""
        means = torch.einsum("lod,bd->blo", self.experts, _with_one(x))
        if self.spec.family == "bernoulli":
            means = means.sigmoid()
        return torch.einsum("bl,blo->bo", self.log_gates(x).exp(), means)

    def log_likelihood(
        self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """log P(y | x) of each row."""
        return (self.log_gates(x) + self.log_density(x, y)).logsumexp(-1)

    def posterior(
        self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, "batch leaves"]:
        """h_leaf, proportional to prior times density; siblings add up to their parent's."""
        return (self.log_gates(x) + self.log_density(x, y)).softmax(-1)

    def log_prior(self) -> Float[Tensor, ""]:
        """What the ridge takes off the log-likelihood: -ridge / 2 * (sum of all squared weights)."""
        total = self.experts.square().sum()
        for gate in self.gates:
            total = total + gate.square().sum()
        return -self.spec.ridge / 2 * total

    @torch.no_grad()
    def em_step(
        self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, "batch outputs"], newton_steps: int = 3
    ) -> float:
        """Do one iteration: posteriors, then every expert and gate alone; return log-likelihood + log prior before it.

        With the prior, that sum never falls: each expert and gate moves to where its own part of the objective is
        higher, `newton_steps` of iteratively reweighted least squares (one makes it a generalized EM).
        """
        wide = _with_one(x)
        joint = self.log_gates(x) + self.log_density(x, y)
        before = float(joint.logsumexp(-1).sum() + self.log_prior())
        h = joint.softmax(-1)
        for gate in self.gates:
            nodes, children, _ = gate.shape
            mass = h.view(len(x), nodes, children, -1).sum(-1)  # h of each child: a node's weight, split
            for node in range(nodes):
                gate[node] = fit_multinomial(wide, mass[:, node], gate[node], ridge=self.spec.ridge, steps=newton_steps)
        for leaf in range(self.spec.leaves):
            if self.spec.family == "gaussian":
                self._fit_gaussian(leaf, wide, y, h[:, leaf])
            else:
                self._fit_bernoulli(leaf, wide, y, h[:, leaf], newton_steps)
        return before

    def _fit_gaussian(self, leaf: int, wide: Tensor, y: Tensor, weight: Tensor) -> None:
        """Weighted least squares given the variance, then the weighted variance of what is left."""
        variance = self.log_variance[leaf].exp()
        moments = wide.t() @ (weight[:, None] * wide)
        eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
        for output in range(y.shape[1]):
            right = wide.t() @ (weight * y[:, output])
            # the ridge is in units of the likelihood, so it weighs more against a noisy expert
            self.experts[leaf, output] = torch.linalg.solve(moments + self.spec.ridge * variance[output] * eye, right)
        if self.spec.noise is None and weight.sum() > 0:
            residual = y - wide @ self.experts[leaf].t()
            variance = (weight[:, None] * residual.square()).sum(0) / weight.sum()
            self.log_variance[leaf] = variance.clamp(min=SMALLEST_VARIANCE).log()

    def _fit_bernoulli(self, leaf: int, wide: Tensor, y: Tensor, weight: Tensor, steps: int) -> None:
        """Logistic regression is a choice between two: its weights are the difference of theirs."""
        for output in range(y.shape[1]):
            mass = weight[:, None] * torch.stack((y[:, output], 1 - y[:, output]), 1)
            half = self.experts[leaf, output] / 2
            # a prior of 2 r on two opposite halves is one of r on their difference
            both = fit_multinomial(wide, mass, torch.stack((half, -half)), ridge=2 * self.spec.ridge, steps=steps)
            self.experts[leaf, output] = both[0] - both[1]


def _with_one(x: Tensor) -> Tensor:
    return torch.cat((x, torch.ones_like(x[:, :1])), 1)


@torch.no_grad()
def fit_multinomial(
    x: Float[Tensor, "batch width"],
    mass: Float[Tensor, "batch classes"],
    start: Float[Tensor, "classes width"],
    *,
    ridge: float,
    steps: int,
) -> Float[Tensor, "classes width"]:
    """Climb sum_n sum_c mass_nc log softmax(W x_n)_c - ridge / 2 |W|^2 by Newton's method (IRLS), never downwards.

    mass: soft targets times the row's weight: a row's sum is its weight. A step that would lower the objective is
    halved until it does not.
    """
    weight = mass.sum(1)
    now = start.clone()
    classes, width = now.shape
    eye = torch.eye(classes * width, dtype=x.dtype, device=x.device)

    def value(w: Tensor) -> float:
        return float((mass * (x @ w.t()).log_softmax(-1)).sum() - ridge / 2 * w.square().sum())

    height = value(now)
    for _ in range(steps):
        p = (x @ now.t()).softmax(-1)
        gradient = (mass - weight[:, None] * p).t() @ x - ridge * now
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("n,ncd,ni,nj->cidj", weight, curvature, x, x).reshape(classes * width, -1)
        step = torch.linalg.solve(hessian + ridge * eye, gradient.flatten()).view_as(now)
        for _ in range(HALVINGS):
            higher = value(now + step)
            if higher >= height:
                now, height = now + step, higher
                break
            step = step / 2
        else:
            break  # at the top, up to rounding
    return now


@dataclass
class Fit:
    """The tree with the highest likelihood of several starts, and what each start went through.

    objective: log-likelihood + log prior before each iteration and after the last, one list a start: never falling.
    log_likelihood: of each start's final tree, the sum over rows.
    """

    model: HMEModel
    objective: list[list[float]] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    models: list[HMEModel] = field(default_factory=list)


def fit_hme(
    spec: HME,
    x: Float[Tensor, "batch inputs"],
    y: Float[Tensor, "batch outputs"],
    *,
    iterations: int = 40,
    starts: int = 5,
    seed: int = 0,
    newton_steps: int = 3,
) -> Fit:
    """Fit a tree by EM from several random starts and keep the likeliest; EM only finds local maxima.

    Computes in the dtype of `x`: use float64. The global generator is left as it was.

    Raises:
        ValueError: for shapes that do not fit the spec, values that are not finite, or labels outside [0, 1].
    """
    _check(spec, x, y, iterations, starts)
    fits: list[tuple[HMEModel, list[float], float]] = []
    for start in range(starts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + start)
            model = spec.build().to(x)
        trace = [model.em_step(x, y, newton_steps) for _ in range(iterations)]
        with torch.no_grad():
            likelihood = model.log_likelihood(x, y).sum()
            trace.append(float(likelihood + model.log_prior()))
        fits.append((model, trace, float(likelihood)))
    best = max(fits, key=lambda each: each[2])[0]
    return Fit(best, [each[1] for each in fits], [each[2] for each in fits], [each[0] for each in fits])


def _check(spec: HME, x: Tensor, y: Tensor, iterations: int, starts: int) -> None:
    if x.dim() != 2 or x.shape[1] != spec.inputs or y.shape != (len(x), spec.outputs) or len(x) == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit: x must be (batch, {spec.inputs}) and y "
            f"(batch, {spec.outputs}), with at least one row"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"x and y must be floating point, got {x.dtype} and {y.dtype}; use float64")
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("x or y holds NaN or infinity; remove those rows first")
    if spec.family == "bernoulli" and not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("a Bernoulli tree needs y between 0 and 1")
    if iterations < 1 or starts < 1:
        raise ValueError(f"iterations and starts must be at least 1, got {iterations} and {starts}")
