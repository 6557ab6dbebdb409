"""Models in the Hugging Face layout: config.json and safetensors, one file or shards, in and out."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from paperworks.checkpoints.families import lookup, writer
from paperworks.checkpoints.family import Family
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
from paperworks.core.errors import CorruptFile
from paperworks.core.json_files import read_json_object
from paperworks.models import DecoderModel, Seq2Seq


class _Named:
    """A source under the names of a family's rules: files carry or lack the base model's prefix, and have aliases."""

    def __init__(self, source: TensorSource, family: Family, rules: list[Rule]) -> None:
        self._source = source
        names = set(source.keys())
        self._names = {name: name for name in names}
        for rule in rules:
            if rule.theirs in names:
                continue
            other = next((name for name in family.other_names(rule.theirs) if name in self._names), None)
            if other is not None:
                self._names[rule.theirs] = self._names.pop(other)
            elif not rule.optional and family.stand_ins.get(rule.theirs) in names:
                self._names[rule.theirs] = family.stand_ins[rule.theirs]

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def load(self, name: str) -> Tensor:
        return self._source.load(self._names[name])

    def repeats(self, name: str, other: str) -> bool:
        """Whether two tensors, where both are there, hold the same numbers."""
        if name not in self._names or other not in self._names or self._names[name] == self._names[other]:
            return True
        return self.shape(name) == self.shape(other) and torch.equal(self.load(name), self.load(other))


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


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> DecoderModel:
    """Load a folder in the Hugging Face layout, in its own dtype unless another is asked for."""
    config = read_json_object(folder / "config.json")
    return _assemble(config, open_store(folder), dtype, str(folder))


def from_transformers(module: nn.Module) -> DecoderModel:
    """Our model with a copy of a transformers model's weights (anything with `.config` and a state dict)."""
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise TypeError(f"{type(module).__name__} has no config: expected a model of the transformers library")
    entries = config.to_dict()
    if _method(entries.get("quantization_config")) == "gguf":
        del entries["quantization_config"]  # how the file stored them: transformers decodes these weights as it loads
    state = lookup(str(entries.get("model_type"))).from_module(module.state_dict())
    return _assemble(entries, _StateDict(state), None, type(module).__name__)


def _method(quantization: Any) -> str | None:
    """The name of a quantization_config's method, which a module in memory has as an enumeration's member."""
    found = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return None if found is None else str(getattr(found, "value", found))


def _assemble(config: Mapping[str, Any], source: TensorSource, dtype: torch.dtype | None, origin: str) -> DecoderModel:
    family = lookup(str(config.get("model_type")))
    spec = family.read(config)
    require_depth(spec, source, origin)
    spec = family.fitted(spec, source)
    rules = family.rules(spec)
    named = _Named(source, family, rules)
    table, head = _tied_names(rules)
    if _tied(spec) and not named.repeats(head, table):
        spec = _untied(spec)  # the file says more than its config, as transformers reads it
        rules = family.rules(spec)
    for copy, whole in family.copies.items():
        if not named.repeats(copy, whole):
            raise CorruptFile(f"{origin}: {copy} should repeat {whole}, and holds other numbers")

    def ignorable(name: str) -> bool:
        return family.ignores(name) or name in family.copies or (_tied(spec) and name == head)

    model = import_weights(spec, named, rules, dtype=dtype, ignorable=ignorable, origin=origin)
    model.source_family = family.model_type
    return cast(DecoderModel, model)


def _tied_names(rules: list[Rule]) -> tuple[str, str]:
    """Their names of the embedding and of the unembedding that it may be tied to ("" where there is none)."""

    def named(end: str) -> str:
        return next((rule.theirs for rule in rules if rule.ours[0].endswith(end)), "")

    return named("embedding.weight"), named("unembedding.weight")


def _tied(spec: Any) -> bool:
    return bool(getattr(spec.decoder if isinstance(spec, Seq2Seq) else spec, "tied", False))


def _untied(spec: Any) -> Any:
    if isinstance(spec, Seq2Seq):
        return replace(spec, decoder=replace(spec.decoder, tied=False))
    return replace(spec, tied=False)


def huggingface_names(model: DecoderModel, model_type: str | None = None) -> dict[str, list[str]]:
    """The paths that transformers gives a model's layers, and ours for each: several where it fuses them.

    It is what `adapt.load_peft(model, folder, rename=...)` asks for. GPT-NeoX's fused query_key_value is left out: its
    rows are ordered by head, which no renaming can express.

    Args:
        model: one of ours.
        model_type: transformers' name of the family; None takes the one that `save_folder` writes: the family that
            the model was read from, or the first that expresses it.

    Raises:
        ValueError: when no Hugging Face family expresses the model's spec, or there is none of that name.
    """
    family = lookup(model_type) if model_type else writer(model.spec, _source_family(model))[0]
    found: dict[str, list[str]] = {}
    for rule in family.rules(model.spec):
        if rule.theirs.endswith(".weight") and isinstance(rule.codec, Stacked):
            found[rule.theirs.removesuffix(".weight")] = [name.removesuffix(".weight") for name in rule.ours]
    return found


def _source_family(model: nn.Module) -> str | None:
    """The model_type of the file that the model was read from; a model that was built has none."""
    found: Any = getattr(model, "source_family", None)
    return found if isinstance(found, str) else None


def save_folder(model: DecoderModel, folder: str | Path, max_shard_bytes: int = 5 * 1024**3) -> None:
    """Write the model so that transformers and the serving engines read it; the folder appears whole or not at all.

    Raises:
        ValueError: when no Hugging Face family expresses the spec, or the model holds tensors that the layout has no
            place for (adapters, compressed layers).
        FileExistsError: when the folder holds anything.
    """
    require_whole(model)
    family, config = writer(model.spec, _source_family(model))
    state = model.state_dict()
    config["torch_dtype"] = config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    rules = family.rules(model.spec)
    if _tied(model.spec):
        rules = [rule for rule in rules if not rule.ours[0].endswith("unembedding.weight")]
    weights = export_weights(model, rules)
    with atomic.writing_directory(folder) as out:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_shards(out, weights, max_bytes=max_shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save(out)
