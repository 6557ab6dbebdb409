"""Measuring a model with its own loss, and the perplexity of a long text."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.train import objective
from paperworks.train.distributed import distribution
from paperworks.train.losses import IGNORED, next_token_loss
from paperworks.train.objective import Loss, Tally


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, batches: Iterable[Any]) -> dict[str, float]:
    """Mean of the loss and of each metric over all elements of `batches`, in evaluation mode.

    A loss that returns (sum, count) is averaged over its elements, a scalar over the batches.
    Returns {"loss": mean, name: mean of each metric}. Raises ValueError when there is nothing to measure.
    """
    device = distribution.place(model, None)
    tally = Tally()
    with evaluating(model):
        for batch in batches:
            value = objective.read(loss(model, distribution.move(batch, device)))
            # Sums over an evaluation set are long: add them up in double precision, on the CPU.
            tally.add("loss", value.sum.item(), float(value.elements))
            tally.add_metrics(value.metrics, value.elements)
    if "loss" not in tally.sums:
        raise ValueError("batches is empty: there is nothing to evaluate")
    if tally.sums["loss"][1] == 0:
        raise ValueError("the loss counted 0 elements in all batches: every target is masked or padding")
    return tally.means()


def perplexity(model: nn.Module, tokens: Int[Tensor, " time"], context: int, stride: int | None = None) -> float:
    """exp(mean negative log likelihood a token) of one text that may be longer than the context.

    A window of `context` tokens moves by `stride` (default: context - 1); each token but the first is scored
    once, in the first window that reaches it, so with a shorter stride after at least context - stride others.
    Raises ValueError when there are fewer than two tokens, or the stride leaves tokens out.
    """
    stride = context - 1 if stride is None else stride
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; one text of at least 2 tokens is needed")
    if context < 2 or not 1 <= stride < context:
        raise ValueError(f"context {context}, stride {stride}; needed are context >= 2 and 1 <= stride < context")
    mean = evaluate(model, next_token_loss, _windows(tokens, context, stride))["loss"]
    return math.exp(mean) if mean < 700 else math.inf


def _windows(tokens: Tensor, context: int, stride: int) -> Iterator[dict[str, Tensor]]:
    """Yield windows whose targets are those tokens that no earlier window has scored."""
    following = torch.cat([tokens[1:], tokens.new_full((1,), IGNORED)])
    scored, start = 0, 0  # `scored` positions have predicted the token after them
    while scored < len(tokens) - 1:
        window, targets = tokens[start : start + context], following[start : start + context].clone()
        targets[: scored - start] = IGNORED
        targets[-1] = IGNORED
        yield {"tokens": window[None], "targets": targets[None]}
        scored, start = start + len(window) - 1, start + stride
