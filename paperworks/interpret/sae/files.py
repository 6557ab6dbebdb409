"""Sparse autoencoders on disk, in SAELens' layout: cfg.json and sae_weights.safetensors in one folder.

Kinds standard, topk, gated and jumprelu, of version 6 and, for reading, of earlier ones. SAELens stores W_enc as
(dim, latents) and W_dec as (latents, dim), a JumpReLU's thresholds without the logarithm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paperworks.core import atomic
from paperworks.core.errors import CorruptFile, unknown
from paperworks.core.json_files import read_json_object
from paperworks.interpret.sae.autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from paperworks.interpret.sae.kinds.gated import Gated
from paperworks.interpret.sae.kinds.jumprelu import JumpReLU
from paperworks.interpret.sae.kinds.standard import Standard
from paperworks.interpret.sae.kinds.topk import TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OURS = "paperworks"  # under metadata: the spec, which says how it was trained; SAELens keeps what it does not know
LAYOUT_VERSION = "6.0.0"  # the first release whose cfg.json looks like this
MOST_WEIGHTS = 2**33  # a hostile cfg.json must not ask for more memory than any published dictionary takes

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMMON = {"W_enc": "encoder", "W_dec": "decoder", "b_dec": "decoder_bias"}
_NAMES = {
    "standard": _COMMON | {"b_enc": "encoder_bias"},
    "topk": _COMMON | {"b_enc": "encoder_bias"},
    "gated": _COMMON | {"b_gate": "gate_bias", "b_mag": "magnitude_bias", "r_mag": "log_magnitude"},
    "jumprelu": _COMMON | {"b_enc": "encoder_bias", "threshold": "log_threshold"},
}
_SPECS: dict[str, type[SparseAutoencoderSpec]] = {
    "standard": Standard,
    "topk": TopK,
    "gated": Gated,
    "jumprelu": JumpReLU,
}


def save(model: SparseAutoencoder, folder: str | Path, *, tap: str | None = None, of: str | None = None) -> None:
    """Write an autoencoder that SAELens reads; the folder appears whole or not at all.

    Args:
        model: any kind.
        folder: where to.
        tap: path of the module it reads; `of`: the model's name. Both are only noted.

    Raises ValueError for weights that are not finite.
    """
    kind = _kind(model.spec)
    tensors = {theirs: _outward(theirs, model.get_parameter(ours)) for theirs, ours in _NAMES[kind].items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity; an autoencoder that diverged is not worth a file")
    config: dict[str, Any] = {
        "architecture": kind,
        "d_in": model.dim,
        "d_sae": model.latents,
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": _centred(model.spec),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": of,
            "hook_name": tap,
            OURS: model.spec.to_dict(),
        },
    }
    if isinstance(model.spec, TopK):
        config |= {"k": model.spec.k, "rescale_acts_by_decoder_norm": False}
    with atomic.writing_directory(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> SparseAutoencoder:
    """Read an autoencoder that `save` or SAELens wrote.

    What SAELens does not store (penalties, for further training) comes from our own note in the file, where there is
    one, else it is the kind's: a penalty of 0.

    Raises:
        FileNotFoundError: when the folder lacks one of the two files.
        CorruptFile: when a file is damaged, contradicts itself or holds values that are not finite.
        ValueError: for kinds and options that would compute something else here; the message names them.
    """
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}; an autoencoder is the two files {CONFIG} and {WEIGHTS}")
    config = read_json_object(path / CONFIG)
    kind = _architecture(config, path / CONFIG)
    _require_plain(config, kind, path / CONFIG)
    dim, latents = (_size(config, name, path / CONFIG) for name in ("d_in", "d_sae"))
    if dim * latents > MOST_WEIGHTS:
        raise CorruptFile(f"{path / CONFIG} asks for {dim} x {latents} weights; no autoencoder is that large")
    tensors = _read_weights(path / WEIGHTS, kind, dim, latents)
    model = _spec(config, kind, latents, path / CONFIG).build(dim).to(tensors["decoder"].dtype)
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
        if kind == "jumprelu" and config.get("apply_b_dec_to_input", True):
            # W_e (x - b_d) + b_e is W_e x + (b_e - W_e b_d)
            model.get_parameter("encoder_bias").sub_(model.encoder @ model.decoder_bias)
    return model.eval()


def noted_tap(folder: str | Path) -> str | None:
    """The path of the module that a folder's autoencoder reads, if it says so; names of SAELens are no paths.

    Raises `FileNotFoundError` and `CorruptFile` as `load` does.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; an autoencoder is the two files {CONFIG} and {WEIGHTS}")
    metadata = read_json_object(path).get("metadata")
    if not isinstance(metadata, Mapping) or OURS not in metadata:
        return None
    tap = metadata.get("hook_name")
    return tap if isinstance(tap, str) else None


def _kind(spec: SparseAutoencoderSpec) -> str:
    for kind, known in _SPECS.items():
        if isinstance(spec, known):
            return kind
    raise ValueError(f"{type(spec).__name__} has no place in SAELens' layout; known are {', '.join(_SPECS)}")


def _centred(spec: SparseAutoencoderSpec) -> bool:
    """Whether this kind subtracts the decoder's bias from its input."""
    return not isinstance(spec, JumpReLU) and not (isinstance(spec, Standard) and spec.decoder == "weighted")


def _outward(name: str, parameter: Tensor) -> Tensor:
    value = parameter.detach().cpu()
    if name == "W_enc":
        value = value.T
    elif name == "threshold":
        value = value.exp()
    return value.contiguous().clone()


def _architecture(config: Mapping[str, Any], path: Path) -> str:
    """The kind; before version 6 it could be left out, and TopK was a standard one's activation function."""
    kind = config.get("architecture", "standard")
    if kind == "standard" and config.get("activation_fn_str", config.get("activation_fn", "relu")) == "topk":
        kind = "topk"
    if kind not in _NAMES:
        raise ValueError(f"{path}: {unknown('kind of autoencoder', str(kind), _NAMES)}")
    return str(kind)


def _require_plain(config: Mapping[str, Any], kind: str, path: Path) -> None:
    """Refuse options that change what is computed and that this room does not have."""
    normalization = config.get("normalize_activations") or "none"
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    wrong = [
        f"{name} is {value!r}"
        for name, value, bad in (
            ("normalize_activations", normalization, normalization != "none"),
            ("activation_fn", activation, activation not in ("relu", "topk")),
            ("rescale_acts_by_decoder_norm", True, bool(config.get("rescale_acts_by_decoder_norm"))),
            ("finetuning_scaling_factor", True, bool(config.get("finetuning_scaling_factor"))),
        )
        if bad
    ]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}, which is not computed here: fold it into the weights first")
    if kind in ("topk", "gated") and not config.get("apply_b_dec_to_input", True):
        raise ValueError(f"{path}: a {kind} autoencoder without apply_b_dec_to_input is not known here")


def _size(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptFile(f"{path} gives {name} as {value!r}; a positive whole number is needed")
    return value


def _read_weights(path: Path, kind: str, dim: int, latents: int) -> dict[str, Tensor]:
    """Our parameters by name, each checked for its shape before it is read."""
    shapes = {"W_enc": [dim, latents], "W_dec": [latents, dim], "b_dec": [dim]}
    read: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing = sorted(_NAMES[kind].keys() - names)
            strange = sorted(names - _NAMES[kind].keys())
            if missing or strange:
                raise CorruptFile(
                    f"{path} is not a {kind} autoencoder: it lacks {', '.join(missing) or 'nothing'} "
                    f"and has besides {', '.join(strange[:5]) or 'nothing'}"
                )
            for theirs, ours in _NAMES[kind].items():
                shape, wanted = file.get_slice(theirs).get_shape(), shapes.get(theirs, [latents])
                if list(shape) != wanted:
                    raise CorruptFile(f"{path}: {theirs} has shape {list(shape)}, {CONFIG} asks for {wanted}")
                read[ours] = _inward(theirs, file.get_tensor(theirs), path)
    except (SafetensorError, RuntimeError) as error:
        raise CorruptFile(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    return read


def _inward(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise CorruptFile(f"{path}: {name} is {tensor.dtype}; floating-point weights are needed")
    if not bool(torch.isfinite(tensor).all()):
        raise CorruptFile(f"{path}: {name} holds NaN or infinity")
    if name == "W_enc":
        return tensor.T
    if name == "threshold":
        # Latents that never had to wait have a threshold of 0, whose logarithm is not finite; the least number does.
        return tensor.clamp_min(torch.finfo(tensor.dtype).tiny).log()
    return tensor


def _spec(config: Mapping[str, Any], kind: str, latents: int, path: Path) -> SparseAutoencoderSpec:
    metadata = config.get("metadata")
    note = metadata.get(OURS) if isinstance(metadata, Mapping) else None
    if note is not None:
        try:
            spec = _SPECS[kind].from_dict(note)
        except ValueError as error:
            raise CorruptFile(f"{path} has a spec that cannot be read: {error}") from error
        if spec.latents != latents:
            raise CorruptFile(f"{path} has d_sae {latents}, but a spec with {spec.latents} latents")
        return spec
    if kind == "topk":
        kwargs = config.get("activation_fn_kwargs")
        k = config.get("k", kwargs.get("k") if isinstance(kwargs, Mapping) else None)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= latents:
            raise CorruptFile(f"{path} gives k as {k!r}; a whole number from 1 to {latents} is needed")
        return TopK(latents=latents, k=k)
    if kind == "gated":
        return Gated(latents=latents, penalty=0.0)
    if kind == "jumprelu":
        return JumpReLU(latents=latents, penalty=0.0)
    centred = config.get("apply_b_dec_to_input", True)
    return Standard(latents=latents, penalty=0.0, decoder="unit" if centred else "weighted")
