"""Linear probes of a whole board: one softmax a square, all squares at once (Li et al. 2022, arXiv:2210.13382).

Read in mine/yours labels their weights are directions that turn a disc over (Nanda et al. 2023, arXiv:2309.00941).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_MOST_STEPS = 500  # L-BFGS on whitened activations needs about a hundred


@dataclass(frozen=True)
class BoardProbe:
    """p(label of square s | a) = softmax_label(weight[s, label] . a + bias[s, label]).

    Attributes:
        weight: (squares, labels, dim). bias: (squares, labels).
    """

    weight: Float[Tensor, "squares labels dim"]
    bias: Float[Tensor, "squares labels"]

    def scores(self, activations: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n squares labels"]:
        """The logits of every square's labels."""
        if activations.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                f"this probe reads activations of {self.weight.shape[-1]} dimensions, got {tuple(activations.shape)}"
            )
        flat = activations.detach().to(self.weight) @ self.weight.flatten(0, 1).T
        out: Tensor = flat.unflatten(-1, self.bias.shape) + self.bias
        return out

    def predict(self, activations: Float[Tensor, "*n dim"]) -> Int[Tensor, "*n squares"]:
        """The likeliest label of every square."""
        return self.scores(activations).argmax(-1)

    def directions(
        self, squares: Int[Tensor, " n"], source: Int[Tensor, " n"], target: Int[Tensor, " n"]
    ) -> Float[Tensor, "n dim"]:
        """weight[s, target] - weight[s, source]: along it, a square's log-odds of the new label rise."""
        return self.weight[squares, target] - self.weight[squares, source]

    def odds(
        self,
        activations: Float[Tensor, "n dim"],
        squares: Int[Tensor, " n"],
        source: Int[Tensor, " n"],
        target: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """log p(target) / p(source) of one square in each activation."""
        offset = self.bias[squares, target] - self.bias[squares, source]
        return (activations * self.directions(squares, source, target)).sum(1) + offset

    def turn(
        self,
        activations: Float[Tensor, "n dim"],
        squares: Int[Tensor, " n"],
        source: Int[Tensor, " n"],
        target: Int[Tensor, " n"],
        odds: float,
    ) -> Float[Tensor, "n dim"]:
        """Move each activation along its square's direction until the log-odds of the new label are `odds`.

            a' = a + (odds - log p(target) / p(source)) d / ||d||^2,   d = weight[s, target] - weight[s, source]

        It is the shortest way there, and a second time changes nothing, so it may be done after every block.
        """
        direction = self.directions(squares, source, target)
        length = direction.square().sum(1).clamp_min(torch.finfo(direction.dtype).tiny)
        missing = odds - self.odds(activations, squares, source, target)
        return activations + (missing / length)[:, None] * direction


def fit_board(
    activations: Float[Tensor, "n dim"],
    labels: Int[Tensor, "n squares"],
    *,
    count: int = 3,
    penalty: float = 1.0,
    tolerance: float = 1e-5,
) -> BoardProbe:
    """Softmax regression of every square at its optimum: the W, b that make least

        - sum_i sum_s log softmax(W_s a_i + b_s)[label of s in i] + penalty / 2 tr(W C W^T),

    C the covariance of the activations. So the penalty is on how far scores spread, and the scores are the same in any
    units or coordinates of the activations: models whose activations differ in size are compared fairly. The problem
    is convex; L-BFGS solves it in coordinates in which the activations are white, where the penalty is ||W||^2, in the
    activations' own floating-point type. A direction with less than a millionth of the largest variance counts as
    constant.

    Args:
        activations: (n, dim).
        labels: (n, squares), whole numbers 0 to count - 1.
        count: labels a square can have.
        penalty: above 0; a square whose label never changes has no optimum without it.
        tolerance: the largest entry of the gradient at which to stop, relative to that at W = 0.

    Raises:
        ValueError: for shapes that do not fit, other labels, activations that are not finite, a penalty not above 0,
            or (numbers of hopeless scale) no optimum.
    """
    _check(activations, labels, count, penalty)
    cases = activations.detach()
    squares = labels.shape[1]
    centre = cases.mean(0)
    whitening = _whitening(cases - centre)
    white = (cases - centre) @ whitening
    rank = white.shape[1]
    wanted = functional.one_hot(labels.long(), count).to(white)

    def loss(parameters: Tensor) -> Tensor:
        weight, bias = parameters[:rank], parameters[rank]
        scores = (white @ weight + bias).unflatten(1, (squares, count))
        fit = (scores.logsumexp(-1).sum() - (scores * wanted).sum()) / len(white)
        out: Tensor = fit + penalty / 2 / len(white) * weight.square().sum()
        return out

    parameters = torch.zeros(rank + 1, squares * count).to(white).requires_grad_()
    (start,) = torch.autograd.grad(loss(parameters), parameters)
    target = tolerance * max(float(start.abs().max()), torch.finfo(white.dtype).tiny)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=_MOST_STEPS,
        tolerance_grad=target,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        solver.zero_grad()
        value = loss(parameters)
        value.backward()
        return float(value.detach())

    solver.step(closure)
    (left,) = torch.autograd.grad(loss(parameters), parameters)
    if not bool(left.abs().max() <= 100 * target):  # rounding ends the descent a little early
        raise ValueError(
            f"the probes found no optimum: the gradient is still {float(left.abs().max()):.1e} (wanted {target:.1e}); "
            f"scale the activations (largest entry {float(cases.abs().max()):.1e}) or raise penalty ({penalty:g})"
        )
    found = parameters.detach()
    weight = whitening @ found[:rank]
    bias = found[rank] - centre @ weight
    return BoardProbe(weight.T.unflatten(0, (squares, count)).contiguous(), bias.view(squares, count))


def _check(activations: Tensor, labels: Tensor, count: int, penalty: float) -> None:
    if activations.dim() != 2 or 0 in activations.shape:
        raise ValueError(f"activations must have shape (n, dim), one row a position, got {tuple(activations.shape)}")
    if labels.dim() != 2 or len(labels) != len(activations) or labels.shape[1] == 0:
        raise ValueError(
            f"{len(activations)} positions need labels (n, squares) of as many rows, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise ValueError(
            f"labels must be whole numbers 0 to {count - 1}, got {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    if not bool(torch.isfinite(activations).all()):
        raise ValueError("an activation is not finite: look for the layer that overflows before fitting a probe")
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}: a square that never changes has no optimum without")


def _whitening(centred: Float[Tensor, "n dim"]) -> Float[Tensor, "dim rank"]:
    """M with (centred M)^T (centred M) / n = 1, without the directions that hardly vary."""
    covariance = centred.T.double() @ centred.double() / len(centred)
    values, directions = torch.linalg.eigh(covariance)
    varies = values > 1e-6 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    out: Tensor = (directions[:, varies] / values[varies].sqrt()).to(centred)
    return out
