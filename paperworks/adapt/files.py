"""Adapters in files of our own: one safetensors file that holds nothing of the base.

Tensors are named `<layer>.<tensor>`. The header's metadata describes, as JSON, the groups of layers that were built
together and which names stand for one and the same tensor, so that what layers share is stored once and shared again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.adapt.apply import adapted, attach, find, names, require_adapted, trained_whole
from paperworks.adapt.contract import Adapter, Delta
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile, unknown

VERSION = 3
_READ = (2, 3)  # 2 has no modules trained whole
_KEY = "paperworks.adapter"


def save(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Write one adapter, and nothing of the base, to a safetensors file; it appears whole or not at all.

    Modules trained whole with it (`modules_to_save`) are in the file. `name` may be left out where there is
    only one.
    """
    from safetensors.torch import save_file

    name = the_only(model, name)
    layers = {place: layer for place, layer in adapted(model).items() if name in layer.deltas}
    groups: dict[int, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for place, layer in layers.items():
        adapter = layer.adapters[name]
        groups.setdefault(id(adapter), {"adapter": adapter.to_dict(), "layers": []})["layers"].append(place)
        for key, value in layer.deltas[name].state_dict().items():
            same = (value.device, value.data_ptr(), value.shape) if value.numel() else f"{place}.{key}"
            if same in first:
                shared[f"{place}.{key}"] = first[same]
            else:
                first[same] = f"{place}.{key}"
                tensors[f"{place}.{key}"] = value.detach().cpu().contiguous()
    whole = {place: module.copies[name] for place, module in trained_whole(model).items() if name in module.copies}
    for place, copied in whole.items():
        tensors |= {f"{place}.{key}": value.detach().cpu().contiguous() for key, value in copied.state_dict().items()}
    header = {"version": VERSION, "groups": list(groups.values()), "shared": shared, "whole": list(whole)}
    with atomic.writing_file(path) as out:
        save_file(tensors, out, metadata={_KEY: json.dumps(header)})


def load(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Put the adapter of a file that `save` wrote on a model, beside others it may have, and use it; in place.

    Raises:
        FileNotFoundError: when there is no such file.
        CorruptFile: when the file is damaged, contradicts itself or holds no adapter.
        ValueError: when layers are missing in the model, have other shapes or carry an adapter of this name, all of
            them listed; the model is unchanged.
    """
    tensors, header = _read(Path(path))
    whole: dict[str, nn.Module] = {}
    kept = {}
    problems: list[str] = []
    for place in header.get("whole", []):
        inside = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{place}.")}
        kept[place] = {key.removeprefix(f"{place}."): tensor for key, tensor in inside.items()}
        problems += fit_whole(model, place, kept[place], whole)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in inside}
    deltas, adapters, more = _fit(model, header, tensors)
    problems += more
    if problems:
        raise ValueError(f"the adapter in {path} was made for another model:\n  " + "\n  ".join(problems[:20]))
    _fill(deltas, tensors, header["shared"])
    attach(model, deltas, adapters, name, whole=whole)
    fill_whole(model, kept, name)
    return model


def fit_whole(model: nn.Module, place: str, held: Mapping[str, Tensor], found: dict[str, nn.Module]) -> list[str]:
    """Note the module that stored tensors are a trained copy of in `found`, or say what does not fit."""
    try:
        module = model.get_submodule(place)
    except AttributeError:
        return [f"{place}: the model has no such module"]
    state = getattr(module, "base", module).state_dict()
    found[place] = module
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in held.items()}:
        stored = ", ".join(f"{key} {tuple(value.shape)}" for key, value in held.items()) or "nothing"
        needed = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
        return [f"{place}: trained whole, stored as {stored}, the model needs {needed}"]
    return []


def fill_whole(model: nn.Module, held: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Load stored tensors into the copies of modules trained whole."""
    for place, module in trained_whole(model).items():
        if place in held:
            module.copies[name].load_state_dict(held[place])


def the_only(model: nn.Module, name: str | None) -> str:
    """`name`, or that of the only adapter. Raises `ValueError` when there are several, or not that one."""
    require_adapted(model)
    known = names(model)
    if name is None and len(known) > 1:
        raise ValueError(f"the model has several adapters ({', '.join(known)}); say which with name=")
    if name is not None and name not in known:
        raise ValueError(unknown("adapter", name, known))
    return known[0] if name is None else name


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: the tensors and the metadata. Raises `CorruptFile` for one that is not whole."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read as an adapter: {error}; copy or save it again") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the file and check that its description is of the form `save` gives it."""
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise CorruptFile(f"{path} holds tensors but no adapter: it was not written by adapt.save")
    try:
        header = json.loads(metadata[_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read as an adapter: {error}; copy or save it again") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version not in _READ:
        readable = " and ".join(map(str, _READ))
        raise CorruptFile(f"{path} has an adapter description of version {version!r}; this release reads {readable}")
    problems = _contradictions(header, tensors)
    if problems:
        raise CorruptFile(f"{path} contradicts itself:\n  " + "\n  ".join(problems[:20]))
    return tensors, header


def _contradictions(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    groups, shared = header.get("groups"), header.get("shared")
    whole = header.get("whole", [])
    if not isinstance(groups, list) or not (groups or whole) or not isinstance(shared, dict):
        return ["its description needs a list of groups and a table of shared tensors"]
    if not isinstance(whole, list) or not all(isinstance(place, str) and place for place in whole):
        return ["its description needs a list of the modules that are trained whole"]
    problems, seen = [], set()
    for number, group in enumerate(groups):
        layers = group.get("layers") if isinstance(group, dict) else None
        if not isinstance(layers, list) or not layers or not all(isinstance(place, str) for place in layers):
            problems.append(f"group {number} names no layers")
            continue
        twice = [place for place in layers if place in seen or layers.count(place) > 1]
        problems += [f"layer {place} is named twice" for place in dict.fromkeys(twice)]
        seen.update(layers)
        if not isinstance(group.get("adapter"), dict):
            problems.append(f"group {number} does not describe its adapter")
    for alias, original in shared.items():
        if not isinstance(original, str) or original not in tensors:
            problems.append(f"{alias} shares the tensor {original!r}, which is not in the file")
        if alias in tensors:
            problems.append(f"{alias} is stored and shared at once")
    return problems


def _fit(
    model: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Delta], dict[str, Adapter], list[str]]:
    """Build the described deltas without memory, and list what of model and file does not fit them."""
    deltas: dict[str, Delta] = {}
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    for group in header["groups"]:
        layers = {place: find(model, place) for place in group["layers"]}
        missing = [f"{place}: the model has no such linear layer" for place, layer in layers.items() if layer is None]
        if missing:
            problems += missing
            continue
        try:
            adapter = Adapter.from_dict(group["adapter"])
            with torch.device("meta"):  # a hostile description of a huge adapter costs nothing
                built = adapter.build_all({place: layer.described() for place, layer in layers.items() if layer})
        except (ValueError, OverflowError, RuntimeError) as error:
            problems.append(str(error))
            continue
        deltas |= built
        adapters |= dict.fromkeys(built, adapter)
    wanted = {f"{place}.{key}": value for place, delta in deltas.items() for key, value in delta.state_dict().items()}
    for key, value in wanted.items():
        stored = tensors.get(header["shared"].get(key, key))
        if stored is None or stored.shape != value.shape:
            found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
            problems.append(f"{key}: {found}, the model needs {tuple(value.shape)}")
        elif stored.is_floating_point() != value.is_floating_point():
            problems.append(f"{key}: of {stored.dtype}, the adapter needs {value.dtype}")
    if not problems:
        problems = [f"{key}: belongs to no layer" for key in [*tensors, *header["shared"]] if key not in wanted]
    return deltas, adapters, problems


def _fill(deltas: Mapping[str, Delta], tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Give the deltas their tensors; names of one tensor get one parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for place, delta in deltas.items():
        trained = dict(delta.named_parameters())
        for key in delta.state_dict():
            original = shared.get(f"{place}.{key}", f"{place}.{key}")
            owner, _, leaf = key.rpartition(".")
            value: Tensor = tensors[original]
            if key in trained:
                value = parameters.setdefault(original, nn.Parameter(value))
            setattr(delta.get_submodule(owner), leaf, value)
