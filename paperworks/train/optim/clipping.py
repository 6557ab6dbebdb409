"""Clipping gradients number by number, as the recurrent networks of 2010 to 2015 did."""

from typing import Any

import torch
from torch.optim import Optimizer

from paperworks.train.optim.optimizers import MakeOptimizer


def clipped_by_value(make: MakeOptimizer, limit: float) -> MakeOptimizer:
    """Return an optimizer maker whose steps see every number of the gradient within [-limit, limit].

    The direction changes with it, which clipping the norm (`Settings.clip`) keeps; both together are rarely meant, so
    train with `clip=None`:

        train.fit(model, loss, batches, train.Settings(clip=None), optimizer=clipped_by_value(torch.optim.Adagrad, 5.0))

    Raises ValueError for a limit that is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")

    def made(groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = make(groups)

        def clip(of: Optimizer, *_: Any) -> None:
            gradients = [p.grad for group in of.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_clamp_min_(gradients, -limit)
            torch._foreach_clamp_max_(gradients, limit)

        optimizer.register_step_pre_hook(clip)
        return optimizer

    return made
