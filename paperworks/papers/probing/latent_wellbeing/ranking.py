"""Ranking texts by few directions of their embeddings (Freire, Tan et al. 2024, arXiv:2402.11777).

Principal components are found without labels; labels of pairs only weigh them: with one component, its sign.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.core.errors import unknown
from paperworks.interpret.probing.labels import as_cases
from paperworks.interpret.probing.probes import Probe, logistic, principal_components

Mode = Literal["single", "paired"]


def fit_ranking(
    better: Float[Tensor, "pairs dim"],
    worse: Float[Tensor, "pairs dim"],
    components: int | None = None,
    *,
    mode: Mode = "single",
    penalty: float = 1.0,
) -> Probe:
    """Logistic regression without intercept of which text is better, on differences of projected embeddings.

        P(a above b) = sigmoid(w . C (phi(a) - phi(b))), with C the principal components of the training embeddings.

    The result has no bias, so swapping a pair flips the decision: score(a) > score(b) is the ranking.

    Args:
        better, worse: embeddings of each pair's texts.
        components: how many principal components are kept; None keeps the embeddings as they are.
        mode: "single" takes the components of all texts, centred; "paired" those of the differences, not centred, for
            their mean is what is looked for.
        penalty: of the regression, see `logistic`.

    Raises:
        ValueError: sides that do not pair up, an unknown mode, more components than there are.
    """
    one, other = as_cases(better), as_cases(worse)
    if one.shape != other.shape:
        raise ValueError(f"texts must pair up as (pairs, dim), got {tuple(one.shape)} and {tuple(other.shape)}")
    if mode not in get_args(Mode):
        raise ValueError(unknown("mode", mode, get_args(Mode)))
    differences = one - other
    if components is None:
        axes = None
    elif mode == "single":
        axes = principal_components(torch.cat([one, other]), components)
    else:
        axes = principal_components(differences, components, center=False)
    features = differences if axes is None else differences @ axes.T
    # Each pair is shown in both orders: without an intercept that is the same regression, its loss counted twice.
    both = torch.cat([features, -features])
    found = logistic(both, torch.arange(len(both)) < len(features), penalty=2 * penalty, intercept=False)
    return Probe(found.direction if axes is None else axes.T @ found.direction)
