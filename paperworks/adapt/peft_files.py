"""LoRA adapters in the layout of Hugging Face's peft: adapter_config.json and adapter_model.safetensors, in and out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.adapt.apply import attach, some
from paperworks.adapt.delta import AdaptedLinear, Adapter, Delta
from paperworks.adapt.files import read_tensors, the_only
from paperworks.adapt.lora import LoRA, LowRankDelta
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.core.linear import features, is_linear_like, is_transposed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Rename = Callable[[str], str | Sequence[str]] | Mapping[str, str | Sequence[str]] | None

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<place>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")
# What else peft's configuration may ask for; a value other than these is a method that is not LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}
_CHANGE_THE_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initializations that also rewrite the base's weight


def load_peft(model: nn.Module, folder: str | Path, name: str = "default", *, rename: Rename = None) -> nn.Module:
    """Put a LoRA adapter that peft saved on a model, beside others it may have, and use it; in place.

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
        ValueError: when the file needs what is not LoRA (DoRA, trained biases, whole modules ...), or does not fit the
            model; everything that is wrong is listed, and the model is unchanged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors, _ = read_tensors(_require(folder, TENSORS))
    problems = _unsupported(config)
    pairs = _pairs(tensors, problems)
    deltas: dict[str, Delta] = {}
    adapters: dict[str, Adapter] = {}
    for place, (down, up) in pairs.items():
        try:
            for path, rows in _targets(model, place, rename, up):
                adapters[path] = adapter = _adapter(config, place, len(down))
                deltas[path] = _delta(model.get_submodule(path), adapter, down, rows)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ValueError(f"the adapter in {folder} cannot be put on this model:\n  " + "\n  ".join(problems[:20]))
    attach(model, deltas, adapters, name)
    return model


def save_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    name: str | None = None,
    rename: Callable[[str], str] | Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA adapter as peft does; the folder appears whole or not at all.

    Args:
        model: with an adapter that is LoRA on every layer.
        folder: where to.
        base_model: what peft's users load as the base, a name on the hub or a folder.
        name: which adapter; may be left out where there is only one.
        rename: from the model's paths to those of peft's users, as a function or a table.

    Raises:
        ValueError: when the adapter is not LoRA, or its options differ in a way that peft's file cannot say.
    """
    name = the_only(model, name)
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, LoRA] = {}
    transposed = False
    for path, layer in some(model).items():
        if name not in layer.deltas:
            continue
        delta, adapter = layer.deltas[name], layer.adapters[name]
        if not isinstance(delta, LowRankDelta) or not isinstance(adapter, LoRA):
            raise ValueError(f"{path} carries a {type(adapter).__name__}; peft's layout is written for LoRA only")
        place = _renamed(path, rename)
        if not isinstance(place, str) or place in adapters:
            raise ValueError(f"rename gives {place!r} for {path}; every layer needs one path of its own")
        adapters[place] = adapter
        transposed |= is_transposed(layer.base)
        tensors[f"{_PREFIX}{place}.lora_A.weight"] = delta.down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{place}.lora_B.weight"] = delta.up.detach().cpu().contiguous()
    config = _config(adapters, base_model, transposed)
    from safetensors.torch import save_file

    with atomic.writing_directory(folder) as out:
        save_file(tensors, out / TENSORS, metadata={"format": "pt"})
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(adapters: Mapping[str, LoRA], base_model: str, transposed: bool) -> dict[str, Any]:
    for field in ("dropout", "rank_stabilized"):
        values = {getattr(adapter, field) for adapter in adapters.values()}
        if len(values) > 1:
            raise ValueError(f"peft's file holds one {field} for all layers; these have {sorted(values)}")
    alphas = {place: _alpha(adapter) for place, adapter in adapters.items()}
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    one = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(p): a.rank for p, a in adapters.items() if a.rank != rank},
        "alpha_pattern": {re.escape(p): value for p, value in alphas.items() if value != alpha},
        "use_rslora": one.rank_stabilized,
        "lora_dropout": one.dropout,
        "target_modules": list(adapters),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
    }


def _alpha(adapter: LoRA) -> float:
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return int(alpha) if alpha == int(alpha) else alpha


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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not JSON ({error}); copy or save it again") from error
    if not isinstance(config, dict):
        raise CorruptFile(f"{path} does not hold a JSON object")
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
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        found.append(
            f"init_lora_weights is {start!r}, which changes the base as well: convert it to plain LoRA in peft"
        )
    return found


def _pairs(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Gather A and B of each layer; say what is no such matrix, or alone."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            problems.append(
                f"{key}, {tensor.dtype} of shape {tuple(tensor.shape)}, is no LoRA matrix of a linear layer"
            )
            continue
        parts.setdefault(match["place"].removeprefix(_PREFIX), {})[match["part"]] = tensor
    problems += [f"{place}: lora_{'B' if 'A' in p else 'A'} is missing" for place, p in parts.items() if len(p) < 2]
    if not parts and not problems:
        problems.append("it holds no LoRA matrices")
    return {place: (part["A"], part["B"]) for place, part in parts.items() if len(part) == 2}


def _pattern(patterns: Mapping[str, Any] | None, place: str, default: Any) -> Any:
    """Look a layer up as peft does: the first key that matches the end of the path, as a regular expression."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", place):
                return value
        except re.error as error:
            raise ValueError(f"the pattern {key!r} is no regular expression: {error}") from error
    return default


def _adapter(config: Mapping[str, Any], place: str, rank: int) -> LoRA:
    stated = _pattern(config.get("rank_pattern"), place, config.get("r", 8))
    if stated != rank:
        raise ValueError(f"the configuration says rank {stated}, the matrices have {rank}")
    return LoRA(
        rank=rank,
        alpha=_pattern(config.get("alpha_pattern"), place, config.get("lora_alpha", 8)),
        dropout=config.get("lora_dropout") or 0.0,
        rank_stabilized=bool(config.get("use_rslora")),
    )


def _renamed(path: str, rename: Rename) -> str | Sequence[str]:
    if rename is None:
        return path
    if callable(rename):
        return rename(path)
    if path not in rename:
        raise ValueError(f"rename has no entry for {path}")
    return rename[path]


def _targets(model: nn.Module, place: str, rename: Rename, up: Tensor) -> list[tuple[str, Tensor]]:
    """Return the model's paths that one layer of the file stands for, with the rows of B that each of them takes."""
    found = _renamed(place, rename)
    paths = [found] if isinstance(found, str) else list(found)
    sizes = []
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if module is None or not (is_linear_like(module) or isinstance(module, AdaptedLinear)):
            raise ValueError(
                f"the model has no linear layer {path}" + ("" if rename else "; pass rename= if it has other names")
            )
        sizes.append(features(module)[1])
    if sum(sizes) != len(up):
        raise ValueError(f"lora_B has {len(up)} rows, the layer {' and '.join(paths)} has {sum(sizes)} outputs")
    return list(zip(paths, up.split(sizes), strict=True))


def _delta(module: nn.Module, adapter: LoRA, down: Tensor, up: Tensor) -> Delta:
    inputs, outputs = features(module)
    with torch.device("meta"):
        delta = adapter.build(inputs, outputs)
    assert isinstance(delta, LowRankDelta)
    if down.shape != delta.down.shape or up.shape != delta.up.shape:
        raise ValueError(
            f"the matrices are {tuple(down.shape)} and {tuple(up.shape)}, the layer needs {tuple(delta.down.shape)} "
            f"and {tuple(delta.up.shape)}"
        )
    delta.down, delta.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())
    return delta
