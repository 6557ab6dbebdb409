"""Our own layout: spec.json (the value the model was built from) beside safetensors shards."""

import json
from pathlib import Path

import torch

from paperworks import atomic
from paperworks.checkpoints.huggingface import read_json
from paperworks.checkpoints.layout import Rule, build_empty, import_weights, require_depth
from paperworks.checkpoints.safetensors import open_store, write_shards
from paperworks.errors import CorruptFile
from paperworks.models import Decoder, DecoderModel

FORMAT = 1


def save_native(model: DecoderModel, folder: str | Path, max_shard_bytes: int = 5 * 1024**3) -> None:
    """Write spec.json, weights and tokenizer; the folder appears whole or not at all."""
    state = model.state_dict()
    expected = set(build_empty(model.spec).state_dict())
    extra = sorted(set(state) - expected)
    if extra:
        raise ValueError(
            f"the model holds tensors that its spec does not describe ({', '.join(extra[:4])}...): "
            "merge or save its adapters first (adapt.merge, adapt.save)"
        )
    if model.spec.tied:
        state.pop("unembedding.weight")
    with atomic.writing_directory(folder) as out:
        header = {"format": FORMAT, "spec": model.spec.to_dict()}
        (out / "spec.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        write_shards(out, ((name, tensor.detach()) for name, tensor in state.items()), max_bytes=max_shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save(out)


def load_native(folder: Path, dtype: torch.dtype | None = None) -> DecoderModel:
    """Load a folder that `save_native` wrote."""
    header = read_json(folder / "spec.json")
    if header.get("format") != FORMAT:
        raise CorruptFile(f"{folder}/spec.json has format {header.get('format')!r}, this version reads {FORMAT}")
    try:
        spec = Decoder.from_dict(header["spec"])
    except (KeyError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{folder}/spec.json does not describe a model: {error}") from error
    source = open_store(folder)
    require_depth(spec, source, str(folder))
    names = [name for name in build_empty(spec).state_dict() if not (spec.tied and name == "unembedding.weight")]
    rules = [Rule(name, (name,)) for name in names]
    return import_weights(spec, source, rules, dtype=dtype, origin=str(folder))
