"""Activation checkpointing (Chen, Xu, Zhang & Guestrin 2016, arXiv:1604.06174): compute again instead of keeping."""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paperworks.core.selection import Targets, select

Model = TypeVar("Model", bound=nn.Module)


class _Recomputed:
    """Mixed in before a module's own class: what its forward pass makes is not kept for the backward pass."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return run(*inputs, **options)
        return checkpoint(run, *inputs, use_reentrant=False, **options)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def recompute(model: Model, targets: Targets = "blocks.*") -> Model:
    """Keep of the chosen modules' forward passes only their inputs, and run them again in the backward pass; in place.

    Memory for activations falls from all layers' to one block's and the blocks' inputs; a step takes about a third
    longer. Outputs, gradients (dropout included), paths and the state dict stay as they are. Calling it again changes
    nothing; hooks inside the modules fire a second time in the backward pass.

    Args:
        model: any module, ours or another library's.
        targets: see `nn.select`; of modules that lie within each other only the outermost is taken. Ours by default;
            `"model.layers.*"` in most of transformers' models.

    Raises:
        ValueError: when a target matches nothing.
    """
    taken: list[str] = []
    for path, module in select(model, targets).items():
        if any(path.startswith(outer + ".") for outer in taken):
            continue
        taken.append(path)
        if not isinstance(module, _Recomputed):
            kind = type(module)
            if kind not in _CLASSES:
                _CLASSES[kind] = type(kind.__name__, (_Recomputed, kind), {"__module__": kind.__module__})
            module.__class__ = _CLASSES[kind]
    return model
