"""Labels of two classes, read the same way by every probe: True or 1 is in the class, False or 0 is outside."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Labels = Bool[Tensor, " n"] | Int[Tensor, " n"] | Float[Tensor, " n"]


def as_truth(labels: Labels, count: int, *, both: bool = True) -> Bool[Tensor, " n"]:
    """Labels as booleans.

    Args:
        labels: (n,), booleans or zeros and ones.
        count: how many there must be.
        both: whether each class must have a case.

    Raises:
        ValueError: for another number of labels, another value (-1, say), or a class without a case.
    """
    if labels.shape != (count,):
        raise ValueError(f"there are {count} cases, so labels must have shape ({count},), got {tuple(labels.shape)}")
    if labels.dtype != torch.bool:
        strange = [value for value in labels.unique().tolist() if value not in (0, 1)]
        if strange:
            raise ValueError(f"labels must be booleans, or 0 and 1; found {strange[:3]}: use labels > 0 for -1 and 1")
    truth = labels.bool()
    if both and (bool(truth.all()) or not bool(truth.any())):
        raise ValueError(f"all {count} labels are {bool(truth.any())}: a comparison needs cases of both classes")
    return truth


def as_cases(activations: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Activations in float64, in which probes are fitted; ValueError when they are not finite (n, dim)."""
    if activations.dim() != 2 or 0 in activations.shape:
        raise ValueError(f"activations must have shape (n, dim), one row a case, got {tuple(activations.shape)}")
    values = activations.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("an activation is not finite: look for the layer that overflows before fitting a probe")
    return values
