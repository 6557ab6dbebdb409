"""Which parameters are trained, in groups of one learning rate and one weight decay each."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from paperworks.core.selection import select_parameters
from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups, name_of
from paperworks.train.settings import Settings


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad` by name; a tied parameter once, under its first name.

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


def undecayed(model: nn.Module) -> set[int]:
    """Ids of the parameters that weight decay leaves alone.

    They are those with fewer than two dimensions, biases, the gains of normalizations (also of more dimensions), and
    what the model's own code excludes, in ours or another library's way:

    - a parameter with `undecayed` (`core.linear.undecayed`) or `_no_weight_decay` (mamba_ssm);
    - parameters named by a module's `no_weight_decay()` (timm) or `_no_weight_decay_params`, relative to the module.
    """
    excluded: set[int] = set()
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm") or isinstance(module, nn.modules.batchnorm._NormBase)
        for name, parameter in module.named_parameters(recurse=False):
            is_marked = getattr(parameter, "undecayed", False) or getattr(parameter, "_no_weight_decay", False)
            if is_marked or is_norm or parameter.dim() < 2 or name == "bias" or name.endswith("_bias"):
                excluded.add(id(parameter))
        if listed := _listed_by(module):
            excluded.update(id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in listed)
    return excluded


def _listed_by(module: nn.Module) -> set[str]:
    method: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
    names = set(method()) if callable(method) else set()
    listed: Any = getattr(module, "_no_weight_decay_params", None)
    return names | {name for name in listed or () if isinstance(name, str)}


def parameter_groups(model: nn.Module, settings: Settings) -> ParameterGroups:
    """Groups that an optimizer starts from: {"params", "lr", "weight_decay"}, none of them empty.

    Decayed parameters come first, then those of decay 0, then those that `settings.groups` sets apart. The decay is the
    optimizer's; where a function makes the optimizer, decayed groups leave the key out, so that its own default holds.
    Raises ValueError when a pattern matches no trained parameter.
    """
    decay = getattr(settings.optimizer, "weight_decay", None)
    named = trainable(model)
    excluded = undecayed(model) if decay != 0 else set()
    factors, decays = _own_settings(model, named, settings)
    members: dict[tuple[float, float | None], list[nn.Parameter]] = {(1.0, decay): [], (1.0, 0.0): []}
    for name, parameter in named.items():
        usual = 0.0 if id(parameter) in excluded else decay
        key = (factors.get(name, 1.0), decays.get(name, usual))
        members.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": settings.lr * factor}
        | ({} if weight_decay is None else {"weight_decay": float(weight_decay)})
        for (factor, weight_decay), parameters in members.items()
        if parameters
    ]


def _own_settings(
    model: nn.Module, named: dict[str, nn.Parameter], settings: Settings
) -> tuple[dict[str, float], dict[str, float]]:
    factors: dict[str, float] = {}
    decays: dict[str, float] = {}
    for group in settings.groups:
        matched = select_parameters(model, group.pattern)
        if not matched.keys() & named.keys():
            raise ValueError(
                f"Group({group.pattern!r}) matches {len(matched)} parameters, such as {next(iter(matched))}, but none "
                "of them is trained (requires_grad)"
            )
        if group.lr_factor is not None:
            factors |= dict.fromkeys(matched, group.lr_factor)
        if group.weight_decay is not None:
            decays |= dict.fromkeys(matched, group.weight_decay)
    return factors, decays


def build_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """Build `settings.optimizer` for the model's parameter groups.

    Raises TypeError when a function returns something else, ValueError when it optimizes what the model does not own.
    """
    groups = parameter_groups(model, settings)
    if isinstance(settings.optimizer, OptimizerSpec):
        return settings.optimizer.build(groups)
    optimizer = settings.optimizer(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer {name_of(settings.optimizer)} returned {type(optimizer).__name__} for the parameter groups; "
            "a torch.optim.Optimizer is needed"
        )
    owned = {id(parameter) for parameter in model.parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in owned]
    if foreign:
        raise ValueError(
            f"the optimizer holds {len(foreign)} tensors that are no parameters of the model "
            f"(the first has shape {tuple(foreign[0].shape)}): they would be missing in checkpoints; "
            "make them parameters of the model"
        )
    return optimizer
