"""TTPD: a truth direction that negation does not turn round (Buerger, Hamprecht & Nadler 2024, arXiv:2407.12831)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.interpret.probing.labels import Labels, as_cases, as_truth
from paperworks.interpret.probing.probes import Probe, logistic

Groups = Int[Tensor, " n"] | Sequence[str]

# The paper's two logistic regressions have no penalty, and so no optimum where classes separate; this is nearly none.
_NEARLY_NO_PENALTY = 1e-6


def centered_by(activations: Float[Tensor, "n dim"], groups: Groups) -> Float[Tensor, "n dim"]:
    """A - mean of its group, for each activation, in float64.

    A group is one data set: one topic in one polarity. Pooling them would leave differences between topics in.
    """
    cases = as_cases(activations)
    named = _numbered(groups, len(cases))
    count = int(named.max()) + 1
    sums = torch.zeros(count, cases.shape[1]).to(cases).index_add_(0, named, cases)
    return cases - (sums / named.bincount(minlength=count).to(cases)[:, None])[named]


def _numbered(groups: Groups, count: int) -> Int[Tensor, " n"]:
    if len(groups) != count:
        raise ValueError(f"there are {count} activations but {len(groups)} groups: say of each which data set it is of")
    if isinstance(groups, Tensor):
        out: Tensor = groups.unique(return_inverse=True)[1]
        return out
    order = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    return torch.tensor([order[name] for name in groups])


@dataclass(frozen=True)
class TruthDirections:
    """The two directions of truth: `general` points to true in both polarities, `polar` in opposite ways.

    `polar` is None where all statements have one polarity: the two directions cannot be told apart then, and `general`
    is their sum (affirmative statements) or difference (negated ones).
    """

    general: Float[Tensor, " dim"]
    polar: Float[Tensor, " dim"] | None


def truth_directions(
    activations: Float[Tensor, "n dim"], labels: Labels, affirmative: Labels, groups: Groups
) -> TruthDirections:
    """Least squares of a - mean(group) = tau t_G + tau p t_P, with tau = 1 for true and -1 for false statements.

    p is 1 for affirmative and -1 for negated statements: t = (X^T X)^-1 X^T A with X = [tau, tau p]. Where the four
    cells (tau, p) are equally large this is t_G = mean(tau a), t_P = mean(tau p a).

    Args:
        activations: of the last token of each statement, as recorded.
        labels: which statements are true.
        affirmative: which statements are not negated.
        groups: the data set of each statement, see `centered_by`.

    Raises:
        ValueError: shapes or labels that do not fit; no true or no false statement.
    """
    cases = centered_by(activations, groups)
    tau = as_truth(labels, len(cases)).double() * 2 - 1
    polarity = as_truth(affirmative, len(cases), both=False).double() * 2 - 1
    if bool((polarity == polarity[0]).all()):
        return TruthDirections(tau @ cases / len(cases), None)
    design = torch.stack([tau, tau * polarity], dim=1)
    solved = torch.linalg.solve(design.T @ design, design.T @ cases)
    return TruthDirections(solved[0], solved[1])


@dataclass(frozen=True)
class TTPD(Probe):
    """Truth from two projections: score = w_1 a . t_G + w_2 a . p + b, which is linear in a."""

    truth: TruthDirections | None = None
    polarity: Float[Tensor, " dim"] | None = None  # p, the direction that tells negations; None without any


def ttpd(
    activations: Float[Tensor, "n dim"],
    labels: Labels,
    affirmative: Labels,
    groups: Groups,
    *,
    penalty: float = _NEARLY_NO_PENALTY,
) -> TTPD:
    """Fit TTPD, training of truth and polarity directions.

    1. t_G from `truth_directions`.
    2. p from logistic regression of polarity on the activations as they are.
    3. Logistic regression of truth on the two features (a . t_G, a . p), both scaled to unit variance.

    With statements of one polarity only a . t_G is used.

    Args:
        activations, labels, affirmative, groups: as in `truth_directions`.
        penalty: of both logistic regressions, see `logistic`; the paper's have none.

    Raises:
        ValueError: as `truth_directions` and `logistic`.
    """
    cases = as_cases(activations)
    truth = truth_directions(cases, labels, affirmative, groups)
    if truth.polar is None:
        polarity, axes = None, truth.general[None]
    else:
        middle = cases.mean(0)  # only the bias of p changes by it, and the fit is better conditioned
        polarity = logistic(cases - middle, affirmative, penalty=penalty).direction
        axes = torch.stack([truth.general, polarity])
    features = cases @ axes.T
    spread = features.std(0, correction=0)
    if not bool((spread > 0).all()):
        raise ValueError("a feature of TTPD does not vary: true and false statements have the same mean activation")
    center = features.mean(0)
    weights = logistic((features - center) / spread, labels, penalty=penalty)
    scaled = weights.direction / spread
    return TTPD(axes.T @ scaled, weights.bias - float(scaled @ center), truth, polarity)
