"""Distillation from the likeliest token of a teacher (AFM, Gunter et al. 2024, arXiv:2407.21075)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.train.losses import IGNORED, cross_entropy_sum, next_targets


def top1_distillation_sum(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    taught: Int[Tensor, " rows"],
    weight: float = 0.9,
) -> Float[Tensor, ""]:
    """Sum of -(1 - weight) log p(target) - weight log p(taught) over rows whose target is not -100.

    The gradient of a row's logits is (1 - weight) (p - onehot(target)) + weight (p - onehot(taught)).

    Args:
        logits: of the student.
        targets: the labels, -100 where nothing is to be predicted.
        taught: what the teacher holds likeliest.
        weight: of the teacher; the rest is the label's. AFM has 0.9.

    Raises ValueError for a weight outside [0, 1], or targets and taught of other shapes than the rows.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if targets.shape != logits.shape[:1] or taught.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need one target and one taught token a row, got {tuple(targets.shape)} and "
            f"{tuple(taught.shape)}"
        )
    taught = taught.masked_fill(targets == IGNORED, IGNORED)
    return (1 - weight) * cross_entropy_sum(logits, targets) + weight * cross_entropy_sum(logits, taught)


class Top1Distillation:
    """A loss for `fit`: next tokens, and what a teacher holds likeliest in their place.

    `teacher` is any model(tokens) -> logits (batch, time, vocab) with the student's vocabulary; it is neither trained
    nor part of what is saved. Batches are those of `next_token_loss`: tokens, or a mapping with "tokens" and maybe
    "targets" and "segments".
    """

    def __init__(self, teacher: nn.Module, weight: float = 0.9) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight}")
        self.teacher, self.weight = teacher, weight

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """(sum of the mixed cross entropy, number of tokens predicted)."""
        parts = {"tokens": batch} if isinstance(batch, Tensor) else dict(batch)
        tokens, segments = parts["tokens"], parts.get("segments")
        where = {} if segments is None else {"segments": segments}
        with torch.no_grad(), evaluating(self.teacher):
            taught = self.teacher(tokens, **where)
        logits = model(tokens, **where)
        if taught.shape != logits.shape:
            raise ValueError(
                f"the teacher returned {tuple(taught.shape)} and the student {tuple(logits.shape)}; both need logits "
                "over one vocabulary"
            )
        targets = next_targets(tokens, parts.get("targets"), segments).flatten()
        likeliest = taught.argmax(-1).flatten()
        total = top1_distillation_sum(logits.flatten(0, 1), targets, likeliest, self.weight)
        return total, (targets != IGNORED).sum()
