"""Models in the Hugging Face layout: config.json and safetensors, one file or shards, in and out."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.checkpoints import hf_names
from paperworks.checkpoints.hf_config import FAMILIES, config_from_spec, spec_from_config
from paperworks.checkpoints.layout import (
    Rule,
    Stacked,
    TensorSource,
    export_weights,
    import_weights,
    require_depth,
    require_whole,
)
from paperworks.checkpoints.safetensors import open_store, write_shards
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile, unknown
from paperworks.models import DecoderModel, Encoder, Seq2Seq


class _Named:
    """A source whose names carry (or lack) the base model's prefix, as files saved from either class do."""

    def __init__(self, source: TensorSource, rules: list[Rule]) -> None:
        self._source = source
        names = set(source.keys())
        self._names = {name: name for name in names}
        for rule in rules:
            for other in (rule.theirs.partition(".")[2], *hf_names.ALIASES.get(rule.theirs, ())):
                if rule.theirs not in names and other in names:
                    self._names[rule.theirs] = self._names.pop(other)
                    break
            other = hf_names.STAND_INS.get(rule.theirs, "")
            if rule.theirs not in self._names and not rule.optional and other in names:
                self._names[rule.theirs] = other

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def load(self, name: str) -> Tensor:
        return self._source.load(self._names[name])


class _StateDict:
    """A state dict as a tensor source."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> Iterable[str]:
        return self._state.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def load(self, name: str) -> Tensor:
        return self._state[name].detach().clone()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CorruptFile` if the file is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not valid JSON: {error}; fetch or write it again") from error
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} should hold a JSON object, it holds a {type(data).__name__}")
    return data


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> DecoderModel:
    """Load a folder in the Hugging Face layout, in its own dtype unless another is asked for."""
    config = read_json(folder / "config.json")
    return _assemble(config, open_store(folder), dtype, str(folder))


def from_transformers(module: nn.Module) -> DecoderModel:
    """Return our model with a copy of a transformers model's weights (anything with `.config` and a state dict)."""
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise TypeError(f"{type(module).__name__} has no config: expected a model of the transformers library")
    return _assemble(config.to_dict(), _StateDict(hf_names.unfused(module.state_dict())), None, type(module).__name__)


def _assemble(config: Mapping[str, Any], source: TensorSource, dtype: torch.dtype | None, origin: str) -> DecoderModel:
    spec = spec_from_config(config)
    if isinstance(spec, Encoder) and not any("pooler.dense" in name for name in source.keys()):  # noqa: SIM118
        spec = replace(spec, pooler=False)  # saved from a model that had only the encoder
    require_depth(spec, source, origin)
    rules = hf_names.rules(str(config["model_type"]), spec)
    named = _Named(source, rules)

    def ignorable(name: str) -> bool:
        return hf_names.ignorable(name) or (_tied(spec) and name == "lm_head.weight")

    return import_weights(spec, named, rules, dtype=dtype, ignorable=ignorable, origin=origin)


def _tied(spec: Any) -> bool:
    return bool(getattr(spec.decoder if isinstance(spec, Seq2Seq) else spec, "tied", False))


def huggingface_names(model: DecoderModel, model_type: str | None = None) -> dict[str, list[str]]:
    """Return the paths that transformers gives a model's layers, and ours for each: several where it fuses them.

    It is what `adapt.load_peft(model, folder, rename=...)` asks for. GPT-NeoX's fused query_key_value is left out: its
    rows are ordered by head, which no renaming can express.

    Args:
        model: one of ours.
        model_type: transformers' name of the family; None takes the one that `save_folder` writes (which for a Phi-3
            is "mistral", the same model with nothing fused).

    Raises:
        ValueError: when no Hugging Face family expresses the model's spec, or there is none of that name.
    """
    kind = model_type or config_from_spec(model.spec)["model_type"]
    if kind not in FAMILIES:
        raise ValueError(unknown("model_type", kind, FAMILIES))
    found: dict[str, list[str]] = {}
    for rule in hf_names.rules(kind, model.spec):
        if rule.theirs.endswith(".weight") and isinstance(rule.codec, Stacked):
            found[rule.theirs.removesuffix(".weight")] = [name.removesuffix(".weight") for name in rule.ours]
    return found


def save_folder(model: DecoderModel, folder: str | Path, max_shard_bytes: int = 5 * 1024**3) -> None:
    """Write the model so that transformers and the serving engines read it; the folder appears whole or not at all.

    Raises:
        ValueError: when no Hugging Face family expresses the spec, or the model holds tensors that the layout has no
            place for (adapters, compressed layers).
        FileExistsError: when the folder holds anything.
    """
    require_whole(model)
    config = config_from_spec(model.spec)
    state = model.state_dict()
    config["torch_dtype"] = config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    rules = hf_names.rules(config["model_type"], model.spec)
    if _tied(model.spec):
        rules = [rule for rule in rules if not rule.ours[0].endswith("unembedding.weight")]
    weights = export_weights(model, rules)
    with atomic.writing_directory(folder) as out:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_shards(out, weights, max_bytes=max_shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save(out)
