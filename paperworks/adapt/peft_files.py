"""Adapters in the layout of Hugging Face's peft: adapter_config.json and adapter_model.safetensors, in and out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.adapt.apply import adapted, attach, find, trained_whole
from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.delta import AdaptedLinear
from paperworks.adapt.dora import DoRA
from paperworks.adapt.files import fill_whole, fit_whole, read_tensors, the_only
from paperworks.adapt.ia3 import IA3
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.lora import LoRA
from paperworks.adapt.peft_names import FROZEN, PREFIX, kept_whole, layer_tensors, stack_keys, tensor_keys
from paperworks.adapt.pissa import PiSSA
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.core.json_files import read_json_object
from paperworks.core.linear import is_transposed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Rename = Callable[[str], str | Sequence[str]] | Mapping[str, str | Sequence[str]] | None

# What else peft's configuration may ask for; a value other than these is a method that is not among ours.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}
# Initializations that also rewrite the base's weight, in ways that cannot be repeated from the files.
_CHANGE_THE_BASE = ("pissa_niter", "olora", "corda", "loftq", "lora_ga")


def load_peft(model: nn.Module, folder: str | Path, name: str = "default", *, rename: Rename = None) -> nn.Module:
    """Put a LoRA, DoRA, PiSSA or IA3 adapter of peft on a model, beside others it may have, and use it; in place.

    Args:
        model: transformers' module, whose paths peft's files use, or another one with `rename`.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: what to call the adapter.
        rename: from the paths in the file to the model's, as a function or a table; for models of this library
            `checkpoints.huggingface_names(model)`. A fused layer that the model holds as several (GPT-2's c_attn) is
            renamed to the list of those, in the order of their rows.

    Raises:
        FileNotFoundError: when a file is missing; a pickle (adapter_model.bin) is never opened.
        CorruptFile: when a file is damaged.
        ValueError: when the file needs what is not among these methods (trained biases, LoHa ...), or does not fit the
            model; everything that is wrong is listed, and the model is unchanged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors, _ = read_tensors(_require(folder, TENSORS))
    problems = _unsupported(config)
    whole: dict[str, nn.Module] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for place, inside in kept_whole(tensors, config.get("modules_to_save") or []).items():
        path = _renamed(place, rename)
        held[str(path)] = inside
        problems += fit_whole(model, str(path), inside, whole)
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{PREFIX}{place}.")}
    deltas: dict[str, Delta] = {}
    adapters: dict[str, Adapter] = {}
    stacks = stack_keys(model, config.get("target_parameters") or [])
    for place, parts in layer_tensors(tensors, stacks, problems).items():
        frozen = parts.pop(FROZEN, None)
        try:
            layers = _targets(model, place, rename, parts)
            for layer, rows in layers:
                _require_same_base(layer, frozen)
                if len(layers) > 1 and config.get("init_lora_weights") == "pissa":
                    raise ValueError("PiSSA of a fused layer cannot be split: each part has other singular values")
                adapters[layer.path] = adapter = _adapter(config, place, layer, rows)
                deltas[layer.path] = _delta(layer, adapter, rows)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if config.get("modules_to_save") and not held:
        problems.append(f"modules_to_save is {config['modules_to_save']}, and the file holds none of them")
    if not deltas and not whole and not problems:
        problems.append("it holds no matrices of an adapter")
    if problems:
        raise ValueError(f"the adapter in {folder} cannot be put on this model:\n  " + "\n  ".join(problems[:20]))
    attach(model, deltas, adapters, name, whole=whole)
    fill_whole(model, held, name)
    return model


def save_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    name: str | None = None,
    rename: Callable[[str], str] | Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA, DoRA, PiSSA or IA3 adapter as peft does; the folder appears whole or not at all.

    Args:
        model: with an adapter that is one of these on every layer.
        folder: where to.
        base_model: what peft's users load as the base, a name on the hub or a folder.
        name: which adapter; may be left out where there is only one.
        rename: from the model's paths to those of peft's users, as a function or a table.

    Raises:
        ValueError: when peft has no place for the adapter, or its options differ in a way that peft's file cannot say.
    """
    name = the_only(model, name)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, AdaptedLinear] = {}
    for path, layer in adapted(model).items():
        if name not in layer.deltas:
            continue
        place = _renamed(path, rename)
        if not isinstance(place, str) or place in layers:
            raise ValueError(f"rename gives {place!r} for {path}; every layer needs one path of its own")
        if isinstance(layer.adapters[name], PiSSA) and hasattr(layer.base, "encode_weight"):
            raise ValueError(
                f"{path}: peft starts PiSSA from a plain weight, and this one is stored in a format; decode the base "
                "(compress.decompress), or keep the adapter with adapt.save"
            )
        layers[place] = layer
    keys = tensor_keys({place: layer.base for place, layer in layers.items()})
    for place, layer in layers.items():
        delta = layer.deltas[name]
        assert isinstance(delta, Delta)
        try:
            parts = delta.to_peft()
        except ValueError as error:
            raise ValueError(f"{place} carries a {type(layer.adapters[name]).__name__}; {error}") from error
        tensors |= {f"{PREFIX}{keys[place]}.{key}": value for key, value in parts.items()}
    whole = {_renamed(p, rename): m.copies[name] for p, m in trained_whole(model).items() if name in m.copies}
    for place, copied in whole.items():
        tensors |= {f"{PREFIX}{place}.{key}": value for key, value in copied.state_dict().items()}
    config = _config({place: layer.adapters[name] for place, layer in layers.items()}, layers, base_model, name)
    config["modules_to_save"] = sorted(map(str, whole)) or None
    from safetensors.torch import save_file

    with atomic.writing_directory(folder) as out:
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, out / TENSORS, metadata={"format": "pt"})
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(
    adapters: Mapping[str, Adapter], layers: Mapping[str, AdaptedLinear], base_model: str, name: str
) -> dict[str, Any]:
    fields = {place: adapter.to_peft() for place, adapter in adapters.items()}
    varied = ("r", "lora_alpha")
    for field in sorted({field for each in fields.values() for field in each} - set(varied)):
        values = {each.get(field) for each in fields.values()}
        if len(values) > 1:
            raise ValueError(f"peft's file holds one {_OURS.get(field, field)} for all layers; these have {values}")
    config: dict[str, Any] = dict(next(iter(fields.values()), {"peft_type": "LORA"}))
    for field, pattern in zip(varied, ("rank_pattern", "alpha_pattern"), strict=True):
        if field in config:
            config[field] = Counter(each[field] for each in fields.values()).most_common(1)[0][0]
            others = {place: each[field] for place, each in fields.items() if each[field] != config[field]}
            config[pattern] = {re.escape(place): value for place, value in others.items()}
    stacked = [place for place, layer in layers.items() if layer.linear_kind == "stacked"]
    if config["peft_type"] == "IA3":
        config["feedforward_modules"] = [p for p, layer in layers.items() if getattr(layer.deltas[name], "inputs", 0)]
    else:
        config |= {"bias": "none", "target_parameters": stacked or None}
    return config | {
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": [place for place in layers if place not in stacked],
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
    }


_OURS = {"lora_dropout": "dropout", "use_rslora": "rank_stabilized", "peft_type": "method", "use_dora": "method"}


def _require(folder: Path, file: str) -> Path:
    path = folder / file
    if path.is_file():
        return path
    pickles = [each.name for each in folder.glob("adapter_model.*") if each.suffix in (".bin", ".pt", ".pth")]
    aside = (
        f"; {pickles[0]} is a pickle, which could run code and is not opened: save the adapter again with peft's "
        "save_pretrained(folder, safe_serialization=True)"
        if pickles
        else ""
    )
    raise FileNotFoundError(f"no {file} in {folder}{aside}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = _require(folder, CONFIG)
    config = read_json_object(path)
    for field, kind in {"r": int, "lora_alpha": int | float, "rank_pattern": dict, "alpha_pattern": dict}.items():
        value = config.get(field, {} if kind is dict else 8)  # 8: peft's own default of r and lora_alpha
        if not isinstance(value if value is not None else {}, kind) or isinstance(value, bool):
            raise CorruptFile(f"{path}: {field} is {value!r}, which peft never writes")
    return config


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{field} is {config[field]!r}; only {plain[0]!r} can be read"
        for field, plain in _PLAIN.items()
        if field in config and config[field] not in plain
    ]
    if config.get("peft_type", "LORA") not in ("LORA", "IA3"):
        found.append(f"peft_type is {config['peft_type']!r}; only 'LORA' and 'IA3' can be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        found.append(
            f"init_lora_weights is {start!r}, which changes the base as well: convert it to plain LoRA in peft"
        )
    return found


def _pattern(patterns: Mapping[str, Any] | None, place: str, default: Any) -> Any:
    """Look a layer up as peft does: the first key that matches the end of the path, as a regular expression."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", place):
                return value
        except re.error as error:
            raise ValueError(f"the pattern {key!r} is no regular expression: {error}") from error
    return default


def _adapter(config: Mapping[str, Any], place: str, layer: LayerInfo, parts: Mapping[str, Tensor]) -> Adapter:
    if config.get("peft_type") == "IA3":
        scale = parts.get("ia3_l")
        inputs = scale is not None and scale.dim() == 2 and scale.shape[0] == 1 and scale.shape[1] == layer.in_features
        if layer.out_features == 1 and inputs:  # (1, 1): the names decide
            listed = config.get("feedforward_modules") or []
            inputs = any(place == each or place.endswith(f".{each}") for each in listed)
        return IA3(feedforward=(layer.path,) if inputs else ())
    rank = _rank(parts, layer)
    stated = _pattern(config.get("rank_pattern"), place, config.get("r", 8))
    if stated != rank:
        raise ValueError(f"the configuration says rank {stated}, the matrices have {rank}")
    cls = DoRA if config.get("use_dora") else PiSSA if config.get("init_lora_weights") == "pissa" else LoRA
    return cls(
        rank=rank,
        alpha=_pattern(config.get("alpha_pattern"), place, config.get("lora_alpha", 8)),
        dropout=config.get("lora_dropout") or 0.0,
        rank_stabilized=bool(config.get("use_rslora")),
    )


def _rank(parts: Mapping[str, Tensor], layer: LayerInfo) -> int:
    for key in ("lora_A.weight", "lora_embedding_A"):
        if key in parts:
            return parts[key].shape[0] // max(layer.experts, 1)
    raise ValueError("lora_A is missing")


def _renamed(path: str, rename: Rename) -> str | Sequence[str]:
    if rename is None:
        return path
    if callable(rename):
        return rename(path)
    if path not in rename:
        raise ValueError(f"rename has no entry for {path}")
    return rename[path]


def _targets(
    model: nn.Module, place: str, rename: Rename, parts: Mapping[str, Tensor]
) -> list[tuple[LayerInfo, dict[str, Tensor]]]:
    """The model's layers that one layer of the file stands for, with the tensors of each: its rows of the outputs'."""
    found = _renamed(place, rename)
    paths = [found] if isinstance(found, str) else list(found)
    layers = []
    for path in paths:
        layer = find(model, path)
        if layer is None:
            raise ValueError(
                f"the model has no linear layer {path}" + ("" if rename else "; pass rename= if it has other names")
            )
        layers.append(layer)
    by_rows = [key for key in ("lora_B.weight", "lora_magnitude_vector") if key in parts]
    if "ia3_l" in parts and parts["ia3_l"].dim() == 2 and parts["ia3_l"].shape[1] == 1:
        by_rows.append("ia3_l")
    sizes = [layer.out_features for layer in layers]
    for key in by_rows:
        if sum(sizes) != len(parts[key]):
            what = key.removesuffix(".weight")
            raise ValueError(
                f"{what} has {len(parts[key])} rows, the layer {' and '.join(paths)} has {sum(sizes)} outputs"
            )
    split = {key: parts[key].split(sizes) if key in by_rows else [parts[key]] * len(layers) for key in parts}
    return [(layer, {key: split[key][i] for key in parts}) for i, layer in enumerate(layers)]


def _require_same_base(layer: LayerInfo, frozen: Tensor | None) -> None:
    """Raise `ValueError` where the file holds a table of the base that is not the model's, such as a longer one."""
    if frozen is None:
        return
    held = layer.weight()
    held = held.mT if layer.kind == "lookup" else held
    if held.shape != frozen.shape or not torch.allclose(held.cpu().float(), frozen.float(), atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"the file holds a base weight {tuple(frozen.shape)} that is not the model's {tuple(held.shape)}: the "
            "adapter was trained on changed embeddings; load that base first"
        )


def _delta(layer: LayerInfo, adapter: Adapter, parts: Mapping[str, Tensor]) -> Delta:
    adapter.require_kind(layer)
    if isinstance(adapter, PiSSA):  # what was taken out of the base is found again from the base, as in peft
        delta = adapter.build(layer)
    else:
        with torch.device("meta"):
            delta = adapter.build(layer.described())
    delta.read_peft(parts)
    delta.layer = replace(layer)
    return delta
