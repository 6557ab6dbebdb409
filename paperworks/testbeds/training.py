"""Training inside an experiment: quiet, unsaved, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paperworks import train
from paperworks.train.batches import Batches
from paperworks.train.objective import Loss


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    on_step: Callable[[int], bool | None] | None = None,
    **settings: Any,
) -> list[float]:
    """Train a model in place, and give the loss of every step.

    Args:
        model, loss, batches: as for `train.fit`.
        steps, lr: of the training; `settings` are further fields of `train.Settings` (optimizer, schedule, warmup ...).
        on_step: called with the number of each step that was taken; True ends the training.
        seed: of what training itself draws (dropout); data is drawn by who makes the batches.
    """
    torch.manual_seed(seed)
    quiet: dict[str, Any] = {"progress": False, "save_every": None, "log_every": steps, "seed": seed} | settings
    return train.fit(model, loss, batches, train.Settings(steps=steps, lr=lr, **quiet), on_step=on_step).losses
