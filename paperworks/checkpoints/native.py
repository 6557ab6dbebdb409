"""Our own layout: spec.json (the value the model was built from) beside safetensors shards.

Compressed layers are stored as their formats' own tensors, which spec.json describes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paperworks.checkpoints.layout import (
    Rule,
    build_empty,
    import_weights,
    repeated_names,
    require_depth,
    require_whole,
)
from paperworks.checkpoints.safetensors import open_store, write_shards
from paperworks.checkpoints.upgrade import from_format_1
from paperworks.compress.files import describe, revive
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.core.json_files import read_json_object
from paperworks.models import ModelSpec
from paperworks.nn import Spec

FORMAT = 2


def save_native(model: nn.Module, folder: str | Path, max_shard_bytes: int = 5 * 1024**3) -> None:
    """Write spec.json, weights and tokenizer; the folder appears whole or not at all."""
    spec = model_spec(model)
    require_whole(model)
    state = model.state_dict()
    compressed = describe(model)
    expected = set(build_empty(spec).state_dict()) | _stored_names(compressed)
    extra = sorted(set(state) - expected)
    if extra:
        raise ValueError(
            f"the model holds tensors that its spec does not describe ({', '.join(extra[:4])}...): "
            "merge or save its adapters first (adapt.merge, adapt.save)"
        )
    for name in repeated_names(model):
        state.pop(name, None)
    with atomic.writing_directory(folder) as out:
        header = {"format": FORMAT, "spec": spec.to_dict()} | ({"compressed": compressed} if compressed else {})
        (out / "spec.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        write_shards(out, ((name, tensor.detach()) for name, tensor in state.items()), max_bytes=max_shard_bytes)
        tokenizer: Any = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save(out)


def model_spec(model: nn.Module) -> ModelSpec:
    """The value the model was built from. Raises `TypeError` for a module that has none."""
    spec: Any = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"{type(model).__name__} cannot be saved in our layout: it needs an attribute `spec`, the ModelSpec it was "
            "built from (a model of another library saves itself: save_pretrained, or safetensors.torch.save_model)"
        )
    return spec


def load_native(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a folder that `save_native` wrote."""
    header = read_json_object(folder / "spec.json")
    if header.get("format") == 1:
        header = header | {"spec": from_format_1(header.get("spec"))}
    elif header.get("format") != FORMAT:
        raise CorruptFile(f"{folder}/spec.json has format {header.get('format')!r}, this version reads {FORMAT}")
    try:
        spec = Spec.from_dict(header["spec"])
        if not isinstance(spec, ModelSpec):
            raise ValueError(f"it describes a {type(spec).__name__}, which is a part")
    except (KeyError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{folder}/spec.json does not describe a model: {error}") from error
    source = open_store(folder)
    require_depth(spec, source, str(folder))
    compressed = header.get("compressed", {})
    if not isinstance(compressed, dict):
        raise CorruptFile(f"{folder}/spec.json describes compressed layers as {type(compressed).__name__}, not a table")
    empty = build_empty(spec)
    elsewhere = {f"{path}.weight" for path in compressed} | repeated_names(empty)
    rules = [Rule(name, (name,)) for name in empty.state_dict() if name not in elsewhere]
    stored = _stored_names(compressed)
    model = import_weights(spec, source, rules, dtype=dtype, ignorable=stored.__contains__, origin=str(folder))
    revive(model, compressed, source.load, dtype=dtype, origin=str(folder))
    return model.eval()


def _stored_names(compressed: dict[str, Any]) -> set[str]:
    """The tensors that stand for compressed weights."""
    return {
        f"{path}.{name}"
        for path, entry in compressed.items()
        if isinstance(entry, dict) and isinstance(entry.get("stored"), dict)
        for name in entry["stored"]
    }
