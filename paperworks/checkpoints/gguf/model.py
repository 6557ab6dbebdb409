"""GGUF files as models: metadata against specs, llama.cpp's tensor names against ours, weights dequantized or kept."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from paperworks.checkpoints.families import FAMILIES as REGISTERED
from paperworks.checkpoints.families import writer
from paperworks.checkpoints.family import Family, GGUFNames, Inexpressible, expect
from paperworks.checkpoints.gguf.reader import GGUFFile
from paperworks.checkpoints.gguf.writer import write
from paperworks.checkpoints.layout import (
    Codec,
    RotaryPermuted,
    Rule,
    Shifted,
    Stacked,
    export_weights,
    import_weights,
    require_depth,
)
from paperworks.compress import GGML, CompressedLinear
from paperworks.compress.ggml.blocks import BLOCKS
from paperworks.core.errors import CorruptFile, unknown
from paperworks.core.selection import replace_module
from paperworks.models import Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, LinearScaling, Llama3Scaling, RMSNorm, RoPE

# The families that GGUF has names for here, by llama.cpp's name of the architecture.
FAMILIES = {family.gguf.architecture: family for family in REGISTERED.values() if family.gguf is not None}

# Entries under the architecture's name that change no logit, or only repeat the shape of a tensor.
INERT = frozenset({"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"})


class _Source:
    def __init__(self, file: GGUFFile, dtype: torch.dtype) -> None:
        self._file, self._dtype = file, dtype

    def keys(self) -> Iterable[str]:
        return self._file.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def load(self, name: str) -> Tensor:
        return self._file.tensors[name].load(self._dtype)


def family_of(file: GGUFFile) -> tuple[Family, GGUFNames]:
    """The family of a file, and its names in GGUF. Raises `ValueError` for an architecture we do not read."""
    architecture = file.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        raise ValueError(unknown("GGUF architecture", str(architecture), FAMILIES))
    return family, family.gguf


class _Entries:
    """The metadata under the architecture's name; entries that nobody asks for are refused at the end."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._architecture = metadata, architecture
        self._read = {f"{architecture}.{name}" for name in INERT}

    def __call__(self, name: str, kind: type, default: Any = None) -> Any:
        key = f"{self._architecture}.{name}"
        self._read.add(key)
        value = self._metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise CorruptFile(f"metadata entry {key} should be a {kind.__name__}, got {value!r}")
        return value

    def at_least_one(self, name: str, default: int | None = None) -> int:
        value = int(self(name, int, default))
        if value < 1:
            raise CorruptFile(f"metadata entry {self._architecture}.{name} must be at least 1, got {value}")
        return value

    def require_all_read(self) -> None:
        rest = sorted(key for key in self._metadata if key.startswith(f"{self._architecture}."))
        for key in rest:
            if key not in self._read:
                raise ValueError(
                    f"metadata entry {key}={self._metadata[key]!r} is not read: it may change what the model computes"
                )


def spec_from_metadata(file: GGUFFile) -> Decoder:
    """The spec that a file's metadata describes.

    Raises:
        ValueError: for an architecture we do not read, or an entry that we do not know.
        CorruptFile: when an entry is missing or of the wrong kind.
    """
    family, names = family_of(file)
    entry = _Entries(file.metadata, names.architecture)
    dim, heads = entry("embedding_length", int), entry.at_least_one("attention.head_count")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CorruptFile("the file has no two-dimensional token_embd.weight: it holds no language model")
    depth = entry("block_count", int)
    if depth > len(file.tensors):
        raise CorruptFile(f"the file describes {depth} blocks but holds only {len(file.tensors)} tensors")
    head_dim = entry.at_least_one("attention.key_length", dim // heads)
    for name, value in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if entry(name, int, value) != value:
            raise ValueError(
                f"metadata entry {names.architecture}.{name}={entry(name, int, value)} is not read with heads of "
                f"{head_dim}: this family has values of the size of its keys, and rotates all of it"
            )
    base, context = float(entry("rope.freq_base", float, 10_000.0)), entry("context_length", int)
    config = {
        "vocab_size": table.shape[0],
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "intermediate_size": entry("feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": entry("attention.head_count_kv", int, heads),
        "head_dim": None if head_dim * heads == dim else head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": float(entry("attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": base,
    }
    spec: Decoder = family.read(config)
    scaling = _scaling(file, base, head_dim, file.metadata.get(f"{names.architecture}.{_TRAINED}", 8192))
    linear = _linear(entry)
    entry.require_all_read()
    block = spec.blocks[0]
    assert isinstance(block.mixer, Attention)
    rope = RoPE(base=base, scaling=scaling or linear)
    return replace(spec, block=replace(block, mixer=replace(block.mixer, position=rope)))


_TRAINED = "rope.scaling.original_context_length"


def _linear(entry: _Entries) -> LinearScaling | None:
    """Position interpolation, as the metadata says it; `ValueError` for another scaling, which we do not read."""
    kind = entry("rope.scaling.type", str, "none")
    # files of before 2023-10 have scale_linear instead
    factor = float(entry("rope.scaling.factor", float, entry("rope.scale_linear", float, 1.0)))
    if kind not in ("none", "linear"):
        raise ValueError(f"metadata entry rope.scaling.type={kind!r} is not read; we read none and linear")
    return LinearScaling(factor=factor) if factor != 1.0 else None


def _scaling(file: GGUFFile, base: float, dim: int, trained: Any) -> Llama3Scaling | None:
    """Recover Llama 3.1's rule from the tensor of divisors it travels as, and check that it gives them."""
    if isinstance(trained, bool) or not isinstance(trained, int):
        raise CorruptFile(f"metadata entry {_TRAINED} should be a int, got {trained!r}")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return None
    if factors.shape != (dim // 2,):
        raise CorruptFile(f"rope_freqs.weight has shape {factors.shape}, expected {(dim // 2,)}: one for each pair")
    divisors = factors.load(torch.float32)
    scaling = Llama3Scaling(factor=max(1.0, round(float(divisors.max()), 4)), trained_length=trained)
    rope = RoPE(base=base)
    if not torch.allclose(rope.unscaled(dim) / scaling.frequencies(rope, dim, 0), divisors, rtol=1e-3):
        raise ValueError("rope_freqs.weight does not follow Llama 3.1's rule, the only one we read from GGUF")
    return scaling


def rules(names: GGUFNames, spec: Decoder) -> Iterator[Rule]:
    """How llama.cpp's tensors correspond to ours."""
    gain: Codec = Shifted(names.gain_shift) if names.gain_shift else Stacked()
    yield Rule("token_embd.weight", ("embedding.weight",))
    yield Rule("output.weight", ("unembedding.weight",), optional=spec.tied)
    yield Rule("output_norm.weight", ("norm.weight",), gain)
    for layer, block in enumerate(spec.blocks):
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        theirs, ours = f"blk.{layer}", f"blocks.{layer}"
        yield Rule(f"{theirs}.attn_norm.weight", (f"{ours}.mixer_norm.weight",), gain)
        yield Rule(f"{theirs}.ffn_norm.weight", (f"{ours}.feedforward_norm.weight",), gain)
        for kind in ("weight", "bias"):
            for other, name, heads in (("q", "query", mixer.heads), ("k", "key", mixer.kv_heads or mixer.heads)):
                codec: Codec = RotaryPermuted(heads) if names.rotary_permuted else Stacked()
                yield Rule(f"{theirs}.attn_{other}.{kind}", (f"{ours}.mixer.{name}.{kind}",), codec)
            yield Rule(f"{theirs}.attn_v.{kind}", (f"{ours}.mixer.value.{kind}",))
            yield Rule(f"{theirs}.attn_output.{kind}", (f"{ours}.mixer.output.{kind}",))
        for name in ("gate", "up", "down"):
            yield Rule(f"{theirs}.ffn_{name}.weight", (f"{ours}.feedforward.{name}.weight",))


def load_gguf(
    file: GGUFFile, dtype: torch.dtype | None = None, origin: str = "the file", keep_quantized: bool = False
) -> DecoderModel:
    """Build the model and dequantize its weights (float32 unless another dtype is asked for).

    With `keep_quantized`, linear layers hold the file's own blocks and decode them when they are used.
    """
    family, names = family_of(file)
    spec = spec_from_metadata(file)
    source = _Source(file, dtype or torch.float32)
    require_depth(spec, source, origin)
    table = list(rules(names, spec))
    model = import_weights(
        spec,
        source,
        table,
        ignorable=lambda name: name == "rope_freqs.weight" or (spec.tied and name == "output.weight"),
        origin=origin,
    )
    if keep_quantized:
        _keep_blocks(model, file, table)
    model.source_family = family.model_type
    return cast(DecoderModel, model)


def _keep_blocks(model: DecoderModel, file: GGUFFile, table: list[Rule]) -> None:
    """Put the file's own blocks in the place of the decoded weights. Rows move as wholes: blocks run along rows."""
    for rule in table:
        tensor = file.tensors.get(rule.theirs)
        path = rule.ours[0].removesuffix(".weight")
        if tensor is None or tensor.type in _PLAIN_TYPES or not path.startswith("blocks."):
            continue
        linear = model.get_submodule(path)
        if isinstance(linear, nn.Linear):
            raw = tensor.raw()
            stored = {"blocks": rule.codec.split(raw, [raw.shape])[0].contiguous().clone()}
            compressed = CompressedLinear.from_stored(
                GGML(kind=tensor.type),
                stored,
                (linear.out_features, linear.in_features),
                linear.weight.dtype,
                linear.bias,
            )
            replace_module(model, path, compressed.eval())


_PLAIN_TYPES = ("F32", "F16", "BF16", "F64")


def gguf_family(spec: Decoder, source: str | None = None) -> tuple[Family, GGUFNames]:
    """The family that writes a spec as GGUF; `source` is the model_type tried first.

    Raises `ValueError` for a spec that none of GGUF's architectures expresses here, with the reasons.
    """
    try:
        family, _ = writer(spec, source, FAMILIES.values())
        block = spec.blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        feedforward = expect(block.feedforward, GatedMLP, "the feedforward part")
        scaling = expect(mixer.position, RoPE, "the positions").scaling
        assert family.gguf is not None
        if not isinstance(scaling, Llama3Scaling | LinearScaling | None):
            raise Inexpressible([f"GGUF has no words for {type(scaling).__name__} here"])
        if (mixer.bias and family.model_type != "qwen2") or feedforward.bias:
            raise Inexpressible([f"the {family.gguf.architecture} architecture has no biases here"])
    except ValueError as error:
        raise ValueError(
            f"this model cannot be written as GGUF yet; architectures: {', '.join(FAMILIES)}. {error}"
        ) from error
    return family, family.gguf


def metadata_from_spec(spec: Decoder, name: str, source: str | None = None) -> dict[str, object]:
    """The metadata of a file for `spec`. Raises `ValueError` for a spec that GGUF's architectures lack."""
    architecture = gguf_family(spec, source)[1].architecture
    mixer, feedforward, norm = spec.blocks[0].mixer, spec.blocks[0].feedforward, spec.norm
    assert isinstance(mixer, Attention)
    assert isinstance(feedforward, GatedMLP)
    assert isinstance(norm, RMSNorm)
    assert isinstance(mixer.position, RoPE)
    head_dim = mixer.head_size(spec.dim)
    entries: Mapping[str, object] = {
        "context_length": spec.context or 1_048_576,
        "embedding_length": spec.dim,
        "block_count": spec.depth,
        "feed_forward_length": feedforward.hidden,
        "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.kv_heads or mixer.heads,
        "attention.layer_norm_rms_epsilon": norm.eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": mixer.position.rotated(head_dim),
        "rope.freq_base": mixer.position.base,
        "vocab_size": spec.vocab_size,
    }
    scaling = mixer.position.scaling
    if isinstance(scaling, Llama3Scaling):
        entries = {**entries, "rope.scaling.original_context_length": scaling.trained_length}
    if isinstance(scaling, LinearScaling):
        entries = {**entries, "rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    general = {"general.architecture": architecture, "general.name": name}
    return general | {f"{architecture}.{key}": value for key, value in entries.items()}


def export_tensors(model: DecoderModel, kind: str, fallback: str) -> Iterator[tuple[str, Tensor, str]]:
    """Yield (name, tensor, type) for each tensor; rows that the type's blocks do not divide take `fallback`."""
    spec = model.spec
    found = list(rules(gguf_family(spec, getattr(model, "source_family", None))[1], spec))
    if spec.tied:
        found = [rule for rule in found if rule.ours != ("unembedding.weight",)]
    weights = export_weights(model, found)
    rope = spec.blocks[0].mixer.position  # type: ignore[attr-defined]
    if isinstance(rope.scaling, Llama3Scaling):
        dim = rope.rotated(spec.blocks[0].mixer.head_size(spec.dim))  # type: ignore[attr-defined]
        yield "rope_freqs.weight", rope.unscaled(dim) / rope.frequencies(dim, spec.context or 0), "F32"
    for name, tensor in weights:
        if tensor.dim() < 2:
            yield name, tensor.float(), "F32"
        else:
            yield name, tensor.float(), kind if tensor.shape[-1] % BLOCKS[kind].values == 0 else fallback


def save_gguf(
    model: DecoderModel,
    path: str | Path,
    kind: str = "F16",
    *,
    fallback: str = "F16",
    tokenizer_metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a GGUF file whose matrices have type `kind` ("F32", "F16", "BF16", "Q8_0", "Q4_0"); norms stay F32."""
    source: str | None = getattr(model, "source_family", None)
    metadata = metadata_from_spec(model.spec, Path(path).stem, source) | dict(tokenizer_metadata or {})
    write(Path(path), metadata, export_tensors(model, kind, fallback))
