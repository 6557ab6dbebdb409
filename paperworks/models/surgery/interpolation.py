"""Mixtures of whole language models: their probabilities averaged, with weights fitted on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def interpolated(
    log_probabilities: Sequence[Float[Tensor, " tokens"]], weights: Sequence[float]
) -> Float[Tensor, " tokens"]:
    """log sum_m weights_m p_m(token): what the models say together of each token.

    Raises ValueError unless there is one weight a model, none negative, and they sum to 1.
    """
    if not log_probabilities or len(log_probabilities) != len(weights):
        raise ValueError(f"{len(log_probabilities)} models and {len(weights)} weights; one a model is needed")
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must be shares that sum to 1, got {list(weights)}")
    return torch.logsumexp(_stacked(log_probabilities) + torch.tensor(weights, dtype=torch.float64).log()[:, None], 0)


def mixture_weights(log_probabilities: Sequence[Float[Tensor, " tokens"]], rounds: int = 50) -> list[float]:
    """The weights under which the models together give these tokens the most probability.

    Expectation maximization from equal weights (Jelinek & Mercer 1980): each round, a model's weight becomes its mean
    share of the tokens' probability. The likelihood has one maximum, and never falls from round to round.
    """
    if not log_probabilities:
        raise ValueError("there is no model to mix")
    logs = _stacked(log_probabilities)
    weights = torch.full((len(logs),), 1 / len(logs), dtype=torch.float64)
    for _ in range(rounds):
        weights = torch.softmax(logs + weights.log()[:, None], 0).mean(1)
    return weights.tolist()


def _stacked(log_probabilities: Sequence[Tensor]) -> Tensor:
    lengths = {len(each) for each in log_probabilities}
    if len(lengths) > 1:
        raise ValueError(f"the models scored different numbers of tokens: {sorted(lengths)}")
    return torch.stack([each.double() for each in log_probabilities])
