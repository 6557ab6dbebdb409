"""Which parameters are trained, with which decay, and the default optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paperworks.train.settings import Settings

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]

# Where torch 2.9 and later has fused kernels; on a CPU they take a seventh of the time of the default (30M parameters).
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with `requires_grad` by name; a tied parameter once, under its first name.

    Raises ValueError when there is none.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        frozen = sum(1 for _ in model.parameters())
        raise ValueError(
            f"nothing to train: none of the model's {frozen} parameters has requires_grad; "
            "unfreeze some (requires_grad_()) or apply an adapter first"
        )
    return parameters


def undecayed(model: nn.Module, decay_embeddings: bool = True) -> set[int]:
    """Return the ids of the parameters that weight decay leaves alone.

    They are those with fewer than two dimensions, biases, and the gains of normalizations (also of more dimensions),
    for these scale and shift where decay means to shrink maps; the tables of embeddings if asked to.
    """
    left_alone: set[int] = set()
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm") or isinstance(module, nn.modules.batchnorm._NormBase)
        is_table = isinstance(module, nn.Embedding | nn.EmbeddingBag) and not decay_embeddings
        for name, parameter in module.named_parameters(recurse=False):
            asked = getattr(parameter, "undecayed", False)  # by the part itself, as its paper prescribes
            if asked or is_norm or is_table or parameter.dim() < 2 or name == "bias" or name.endswith("_bias"):
                left_alone.add(id(parameter))
    return left_alone


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return the groups an optimizer starts from: decayed parameters first, then the others; empty ones left out."""
    left_alone = undecayed(model, settings.decay_embeddings) if settings.weight_decay else set()
    parameters = list(trainable(model).values())
    decayed = [parameter for parameter in parameters if id(parameter) not in left_alone]
    others = [parameter for parameter in parameters if id(parameter) in left_alone]
    groups = [(decayed, settings.weight_decay), (others, 0.0)]
    return [
        {"params": members, "lr": settings.lr, "weight_decay": weight_decay}
        for members, weight_decay in groups
        if members
    ]


def adamw(groups: list[dict[str, Any]], settings: Settings) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101), fused where torch can."""
    parameters: Iterable[Tensor] = (parameter for group in groups for parameter in group["params"])
    fused = all(p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES for p in parameters)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused or None)


def make(model: nn.Module, settings: Settings, optimizer: MakeOptimizer | None) -> Optimizer:
    """Build the optimizer: AdamW, or what the caller's function makes of the same groups.

    Raises TypeError when the function returns something else, ValueError when it optimizes what the model does not own.
    """
    groups = parameter_groups(model, settings)
    if optimizer is None:
        return adamw(groups, settings)
    made = optimizer(groups)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer(groups) returned {type(made).__name__}; a torch.optim.Optimizer is needed")
    owned = {id(parameter) for parameter in model.parameters()}
    strangers = [p for group in made.param_groups for p in group["params"] if id(p) not in owned]
    if strangers:
        raise ValueError(
            f"the optimizer holds {len(strangers)} tensors that are no parameters of the model "
            f"(the first has shape {tuple(strangers[0].shape)}): they would be missing in checkpoints; "
            "make them parameters of the model"
        )
    return made
