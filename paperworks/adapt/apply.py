"""Putting adapters on a model, switching them off, merging, removing, saving and loading them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from paperworks import atomic
from paperworks.adapt.delta import AdaptedLinear, Adapter
from paperworks.errors import CorruptFile
from paperworks.nn.linear import features, is_linear_like, weight_of, write_weight
from paperworks.nn.selection import Targets, replace_module, select


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def apply(model: nn.Module, adapter: Adapter, targets: Targets = "attention") -> nn.Module:
    """Put an adapter on each chosen linear layer and freeze everything else; in place.

    Args:
        model: any module, ours or another library's; its layers may be compressed.
        adapter: such as `LoRA(rank=8, alpha=16)`.
        targets: see `nn.select`.

    Raises:
        ValueError: when a target matches nothing, has an adapter already, or is too small for the adapter.
    """
    present = set(adapted(model))
    inside = tuple(f"{path}." for path in present)
    chosen = select(
        model, targets, lambda module: is_linear_like(module) or isinstance(module, AdaptedLinear), "linear layer"
    )
    chosen = {path: module for path, module in chosen.items() if not path.startswith(inside)} if inside else chosen
    taken = [path for path in chosen if path in present]
    if taken:
        raise ValueError(
            f"{taken[0]} has an adapter already ({adapted(model)[taken[0]].adapter}); merge or remove it first"
        )
    deltas = {path: adapter.build(*features(module)) for path, module in chosen.items()}  # all errors before any change
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, delta in deltas.items():
        base = chosen[path]
        device = next(chain(base.parameters(), base.buffers())).device
        wrapped = AdaptedLinear(base, delta.to(device), adapter)
        replace_module(model, path, wrapped.train(base.training))
    for module in adapted(model).values():
        module.delta.requires_grad_(True)
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


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add each delta to its base's weight, in the base's own format, and drop the adapter; in place."""
    for path, module in _some(model).items():
        weight = weight_of(module.base)
        merged = weight.float() + module.delta.weight().float()
        write_weight(module.base, merged.to(weight.dtype))
        replace_module(model, path, module.base)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Drop the adapters; in place. The base stays frozen; `model.requires_grad_(True)` thaws it."""
    for path, module in _some(model).items():
        replace_module(model, path, module.base)
    return model


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and nothing of the base, to one safetensors file; it appears whole or not at all."""
    from safetensors.torch import save_file

    layers = _some(model)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in layers.items()
        for key, value in module.delta.state_dict().items()
    }
    header = {name: module.adapter.to_dict() for name, module in layers.items()}
    with atomic.writing_file(path) as out:
        save_file(tensors, out, metadata={"paperworks.adapter": json.dumps(header)})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Put the adapters of a file that `save` wrote on a model that has none; in place.

    Raises:
        FileNotFoundError: when there is no such file.
        CorruptFile: when the file is damaged or holds no adapter.
        ValueError: when layers are missing in the model or have other shapes, all of them listed.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("paperworks.adapter", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptFile(f"{path} cannot be read as an adapter: {error}; copy or save it again") from error
    if not isinstance(header, dict):
        raise CorruptFile(f"{path} holds tensors but no adapter: it was not written by adapt.save")
    if adapted(model):
        raise ValueError("the model has adapters already; merge or remove them first")
    modules = dict(model.named_modules())
    problems, deltas = [], {}
    for name, description in header.items():
        module = modules.get(name)
        if module is None or not is_linear_like(module):
            problems.append(f"{name}: the model has no such linear layer")
            continue
        adapter = Adapter.from_dict(description)
        try:
            delta = adapter.build(*features(module))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        state = {key: tensors.get(f"{name}.{key}") for key in delta.state_dict()}
        for key, value in delta.state_dict().items():
            stored = state[key]
            if stored is None or stored.shape != value.shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
                problems.append(f"{name}.{key}: {found}, the model needs {tuple(value.shape)}")
        deltas[name] = (adapter, delta, state)
    if problems:
        listing = "\n  ".join(problems[:20])
        raise ValueError(f"the adapter in {path} was made for another model:\n  {listing}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, (adapter, delta, state) in deltas.items():
        for key, value in state.items():
            assert value is not None
            setattr(delta, key, nn.Parameter(value))
        base = modules[name]
        replace_module(model, name, AdaptedLinear(base, delta.to(weight_of(base).device), adapter).train(base.training))
    return model


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of parameters that training would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _some(model: nn.Module) -> dict[str, AdaptedLinear]:
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters; put some on with adapt.apply or adapt.load")
    return layers
