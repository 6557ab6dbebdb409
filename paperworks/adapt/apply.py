"""Putting adapters on a model, choosing which of them act, and taking them off."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from paperworks.adapt.delta import AdaptedLinear, Adapter, Delta, check_name
from paperworks.core.errors import unknown
from paperworks.core.linear import features, is_linear_like
from paperworks.core.selection import Targets, replace_module, select


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def names(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters."""
    return list(dict.fromkeys(name for layer in adapted(model).values() for name in layer.deltas))


def in_use(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that act, and the weight of each."""
    return {name: weight for layer in adapted(model).values() for name, weight in layer.in_use.items()}


def apply(
    model: nn.Module,
    adapter: Adapter,
    targets: Targets = "attention",
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put an adapter on each chosen linear layer and freeze everything else; in place.

    A model may carry several adapters under different names. The one put on last is in use, alone (see `use`).

    Args:
        model: any module, ours or another library's; its layers may be compressed.
        adapter: such as `LoRA(rank=8, alpha=16)`.
        targets: see `nn.select`.
        name: what to call it; the same name may be put on other layers later.
        dtype: of the adapter's numbers, such as `torch.bfloat16`; None leaves what the adapter chooses (float32).

    Raises:
        ValueError: when a target matches nothing, has an adapter of this name already, or is too small for it.
    """
    chosen = adaptable(model, targets)
    deltas = adapter.build_all({path: features(module) for path, module in chosen.items()})
    attach(model, deltas, dict.fromkeys(deltas, adapter.own()), name, dtype)
    return model


def adaptable(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Return the layers that `targets` names by path: linear-like ones, wrapped or not, but nothing inside wrappers."""
    inside = tuple(f"{path}." for path in adapted(model))
    chosen = select(
        model, targets, lambda module: is_linear_like(module) or isinstance(module, AdaptedLinear), "linear layer"
    )
    return {path: module for path, module in chosen.items() if not inside or not path.startswith(inside)}


def attach(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    adapters: Mapping[str, Adapter],
    name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Put ready deltas on the layers at their paths under one name, and use that; all errors before any change."""
    check_name(name)
    present = adapted(model)
    taken = [path for path in deltas if path in present and name in present[path].deltas]
    if taken:
        raise ValueError(
            f"{taken[0]} has an adapter already named {name!r} ({present[taken[0]].adapters[name]}); "
            "merge or remove it first, or give the new one another name="
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, delta in deltas.items():
        module = model.get_submodule(path)
        base = module.base if isinstance(module, AdaptedLinear) else module
        assert isinstance(base, nn.Module)
        delta.to(next(chain(base.parameters(), base.buffers())).device, dtype).train(module.training)
        if isinstance(module, AdaptedLinear):
            module.add(name, delta, adapters[path])
        else:
            replace_module(model, path, AdaptedLinear(base, delta, adapters[path], name).train(module.training))
    use(model, name)


def use(model: nn.Module, which: str | Mapping[str, float] | None) -> nn.Module:
    """Choose the adapters that act and are trained: one, a weighted sum, or none; in place, nothing is copied.

    Args:
        model: a model with adapters.
        which: a name; `{"a": 0.7, "b": 0.3}` for base + 0.7 a + 0.3 b; None for the base alone.

    Raises:
        ValueError: for a name the model does not have, or a weight that is not finite.
    """
    layers, known = some(model), names(model)
    wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        if name not in known:
            raise ValueError(unknown("adapter", name, known))
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")
    for layer in layers.values():
        layer.in_use = {name: float(weight) for name, weight in wanted.items() if name in layer.deltas}
        for name, delta in layer.deltas.items():
            delta.requires_grad_(name in wanted)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without its adapters: exactly the base, bit for bit."""
    states = {module: module.enabled for module in adapted(model).values()}
    for module in states:
        module.enabled = False
    try:
        yield model
    finally:
        for module, enabled in states.items():
            module.enabled = enabled


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Drop one adapter, or all; in place. The base stays frozen; `model.requires_grad_(True)` thaws it."""
    layers = some(model)
    if name is not None and name not in names(model):
        raise ValueError(unknown("adapter", name, names(model)))
    drop(model, layers, names(model) if name is None else [name])
    return model


def drop(model: nn.Module, layers: Mapping[str, AdaptedLinear], dropped: list[str]) -> None:
    """Take the named deltas off; a layer that has none left is its base again."""
    for path, layer in layers.items():
        for name in dropped:
            if name in layer.deltas:
                layer.drop(name)
        if not layer.deltas:
            replace_module(model, path, layer.base)


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of parameters that training would change; one shared by layers counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def some(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers. Raises `ValueError` when there are none."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters; put some on with adapt.apply or adapt.load")
    return layers
