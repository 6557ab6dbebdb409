"""Compressed layers in safetensors files: plain tensors, and a JSON header that says what they are."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.compress.error import LayerError
from paperworks.compress.format import WeightFormat
from paperworks.compress.linear import CompressedLinear
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.core.linear import bias_of, features, is_linear_like, weight_of
from paperworks.core.selection import replace_module

HEADER = "paperworks.compressed"


def describe(model: nn.Module) -> dict[str, Any]:
    """What must be known of each compressed layer besides its tensors, ready for JSON."""
    return {
        path: {
            "format": layer.format.to_dict(),
            "shape": list(layer.shape),
            "dtype": str(layer.compute_dtype).removeprefix("torch."),
            "stored": {name: [_dtype_name(x), list(x.shape)] for name, x in layer.stored.items()},
            "error": None if layer.error is None else [layer.error.weight, layer.error.output],
        }
        for path, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
    }


def revive(
    model: nn.Module,
    description: Mapping[str, Any],
    tensor: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    origin: str = "the file",
) -> nn.Module:
    """Put the described layers in the place of the model's linear ones, biases kept; in place, or not at all.

    Args:
        model: with plain linear layers (or compressed ones) at the described paths.
        description: what `describe` gave.
        tensor: returns a stored tensor by "path.name", or raises `KeyError`.
        dtype: what the layers decode to; None takes the one they had.
        origin: for error messages.

    Raises:
        CorruptFile: for a description that says nothing sensible, or tensors other than described.
        ValueError: listing every layer that the model does not have in that shape.
    """
    modules = dict(model.named_modules())
    layers: dict[str, CompressedLinear] = {}
    problems: list[str] = []
    for path, entry in description.items():
        module = modules.get(path)
        if module is None or not is_linear_like(module):
            problems.append(f"{path}: the model has no such linear layer")
            continue
        format, shape, decoded = _entry(path, entry, origin)
        columns, rows = features(module)
        if shape != (rows, columns):
            problems.append(f"{path}: stored for {shape[0]} x {shape[1]}, the model has {rows} x {columns}")
            continue
        device = weight_of(module).device if not isinstance(module, CompressedLinear) else None
        stored = {name: _stored(tensor, path, name, entry, origin) for name in entry["stored"]}
        if device is not None and device.type != "meta":
            stored = {name: value.to(device) for name, value in stored.items()}
        layers[path] = CompressedLinear.from_stored(format, stored, shape, dtype or decoded, bias_of(module))
        layers[path].error = None if not entry.get("error") else LayerError(*entry["error"])
    if problems:
        listing = "\n  ".join(problems[:20])
        raise ValueError(f"{origin} holds layers of another model:\n  {listing}")
    for path, layer in layers.items():
        replace_module(model, path, layer.train(modules[path].training))
    return model


def save(model: nn.Module, path: str | Path) -> None:
    """Write the compressed layers of any model, and nothing else of it; the file appears whole or not at all.

    Raises `ValueError` when the model has none.
    """
    from safetensors.torch import save_file

    description = describe(model)
    if not description:
        raise ValueError("the model has no compressed layers; make some with compress.apply")
    tensors = {
        f"{at}.{name}": value.detach().cpu().contiguous()
        for at, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
        for name, value in layer.stored.items()
    }
    with atomic.writing_file(path) as out:
        save_file(tensors, out, metadata={HEADER: json.dumps(description)})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Put the layers of a file that `save` wrote into a model of the same architecture; in place, or not at all.

    Raises:
        FileNotFoundError: when there is no such file.
        CorruptFile: when it is damaged, or holds no compressed layers.
        ValueError: when the model lacks some of the layers or has them in other shapes, all listed.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(HEADER, "null"))
            if not isinstance(description, dict):
                raise CorruptFile(f"{path} holds no compressed layers: it was not written by compress.save")

            def tensor(name: str) -> Tensor:
                if name not in names:
                    raise KeyError(name)
                found: Tensor = file.get_tensor(name)
                return found

            names = set(file.keys())
            return revive(model, description, tensor, origin=str(path))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}; copy or save it again") from error


def _entry(path: str, entry: Any, origin: str) -> tuple[WeightFormat, tuple[int, int], torch.dtype]:
    try:
        format = WeightFormat.from_dict(entry["format"])
        rows, columns = (int(size) for size in entry["shape"])
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype) or not isinstance(entry["stored"], dict):
            raise ValueError(f"dtype {entry['dtype']!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{origin} does not describe the layer {path}: {error}") from error
    return format, (rows, columns), dtype


def _stored(tensor: Callable[[str], Tensor], path: str, name: str, entry: Any, origin: str) -> Tensor:
    try:
        value = tensor(f"{path}.{name}")
    except KeyError as error:
        raise CorruptFile(f"{origin} lacks the tensor {path}.{name} that it describes") from error
    if [_dtype_name(value), list(value.shape)] != entry["stored"][name]:
        raise CorruptFile(
            f"{origin}: {path}.{name} is {_dtype_name(value)} of shape {list(value.shape)}, described as "
            f"{entry['stored'][name]}"
        )
    return value


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
