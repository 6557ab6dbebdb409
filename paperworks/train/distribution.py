"""The one place that knows how many processes train together. There is one process today.

Nothing else in this room asks for a rank, moves a model or adds over processes, so that DDP and FSDP2 come in here:

- `place` returns the module to call: with several processes it would wrap or shard it;
- `total` adds a count over processes: gradients are divided by the elements of ALL processes, not of each;
- `is_first` says who writes: checkpoints, metrics and the progress bar;
- `agree` makes one process's wish (an interrupt) everybody's, so that all stop at the same step.
"""

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Count = TypeVar("Count", bound=float | Tensor)


def require_single_process() -> None:
    """Raise RuntimeError under a launcher of several processes: each would train its own model and not say so."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {processes}, and train.fit runs in one process so far: "
            "start it without torchrun, or with --nproc-per-node=1"
        )


def place(model: nn.Module, device: str | None) -> torch.device:
    """Move the model to `device` (in place; None leaves it) and return the device its batches must go to."""
    if device is not None:
        model.to(device)
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def move(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in its mappings, lists and tuples on `device`; other values as they are."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(move(value, device) for value in batch)
    return batch


def total(count: Count) -> Count:
    """Return the sum of `count` over all processes."""
    return count


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return True


def agree(wish: bool) -> bool:
    """Return whether any process wishes it."""
    return wish
