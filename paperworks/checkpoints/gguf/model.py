"""GGUF files as models: metadata against specs, llama.cpp's tensor names against ours, weights dequantized or kept."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.checkpoints.gguf.reader import GGUFFile
from paperworks.checkpoints.gguf.writer import write
from paperworks.checkpoints.hf_config import config_from_spec
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
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, Llama3Scaling, RMSNorm, RoPE

ARCHITECTURES = ("llama", "qwen2", "gemma")


class _Source:
    def __init__(self, file: GGUFFile, dtype: torch.dtype) -> None:
        self._file, self._dtype = file, dtype

    def keys(self) -> Iterable[str]:
        return self._file.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def load(self, name: str) -> Tensor:
        return self._file.tensors[name].load(self._dtype)


def spec_from_metadata(file: GGUFFile) -> Decoder:
    """Return the spec that a file's metadata describes.

    Raises:
        ValueError: for an architecture we do not read.
        CorruptFile: when an entry is missing or of the wrong kind.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(unknown("GGUF architecture", str(architecture), ARCHITECTURES))

    def entry(name: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise CorruptFile(f"metadata entry {architecture}.{name} should be a {kind.__name__}, got {value!r}")
        return value

    dim, heads = entry("embedding_length", int), entry("attention.head_count", int)
    if heads < 1:
        raise CorruptFile(f"metadata entry {architecture}.attention.head_count must be at least 1, got {heads}")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CorruptFile("the file has no two-dimensional token_embd.weight: it holds no language model")
    gemma = architecture == "gemma"
    norm = RMSNorm(eps=float(entry("attention.layer_norm_rms_epsilon", float)), offset=gemma)
    head_dim = entry("attention.key_length", int, dim // heads)
    if head_dim < 1:
        raise CorruptFile(f"metadata entry {architecture}.attention.key_length must be at least 1, got {head_dim}")
    rotated = entry("rope.dimension_count", int, head_dim)
    base = float(entry("rope.freq_base", float, 10_000.0))
    scaling = _scaling(file, base, rotated, entry("rope.scaling.original_context_length", int, 8192))
    mixer = Attention(
        heads=heads,
        kv_heads=entry("attention.head_count_kv", int, heads),
        head_dim=None if head_dim * heads == dim else head_dim,
        bias=architecture == "qwen2",
        output_bias=False,
        position=RoPE(base=base, fraction=rotated / head_dim, scaling=scaling),
    )
    return Decoder(
        vocab_size=table.shape[0],
        dim=dim,
        depth=entry("block_count", int),
        context=entry("context_length", int),
        tied="output.weight" not in file.tensors,
        embedding_scale=float(dim) ** 0.5 if gemma else None,
        norm=norm,
        block=Block(
            norm=norm,
            mixer=mixer,
            feedforward=GatedMLP(hidden=entry("feed_forward_length", int), activation="gelu_tanh" if gemma else "silu"),
        ),
    )


def _scaling(file: GGUFFile, base: float, dim: int, trained: int) -> Llama3Scaling | None:
    """Recover Llama 3.1's rule from the tensor of divisors it travels as, and check that it gives them."""
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


def rules(architecture: str, spec: Decoder) -> list[Rule]:
    """Return how llama.cpp's tensors correspond to ours."""
    return list(_rules(architecture, spec))


def _rules(architecture: str, spec: Decoder) -> Iterator[Rule]:
    gain: Codec = Shifted(1.0) if architecture == "gemma" else Stacked()
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
                codec: Codec = RotaryPermuted(heads) if architecture == "llama" else Stacked()
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
    spec = spec_from_metadata(file)
    source = _Source(file, dtype or torch.float32)
    require_depth(spec, source, origin)
    architecture = str(file.metadata["general.architecture"])
    table = rules(architecture, spec)
    model = import_weights(
        spec,
        source,
        table,
        ignorable=lambda name: name == "rope_freqs.weight" or (spec.tied and name == "output.weight"),
        origin=origin,
    )
    if keep_quantized:
        _keep_blocks(model, file, table)
    return model


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


def metadata_from_spec(spec: Decoder, name: str) -> dict[str, object]:
    """Return the metadata of a file for `spec`. Raises `ValueError` for a spec that GGUF's architectures lack."""
    kind = config_from_spec(spec)["model_type"]
    mixer, feedforward, norm = spec.blocks[0].mixer, spec.blocks[0].feedforward, spec.norm
    assert isinstance(mixer, Attention)
    architecture = {"llama": "llama", "qwen2": "qwen2", "gemma": "gemma"}.get(kind)
    if (
        architecture is None
        or not isinstance(mixer.position, RoPE)
        or not isinstance(feedforward, GatedMLP)
        or not isinstance(norm, RMSNorm)
        or (mixer.position.scaling is not None and not isinstance(mixer.position.scaling, Llama3Scaling))
        or (architecture == "llama" and (mixer.bias or mixer.output_bias or feedforward.bias))
    ):
        raise ValueError(
            f"a {kind} model with these options cannot be written as GGUF yet; architectures: {ARCHITECTURES}"
        )
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
    general = {"general.architecture": architecture, "general.name": name}
    return general | {f"{architecture}.{key}": value for key, value in entries.items()}


def export_tensors(model: DecoderModel, kind: str, fallback: str) -> Iterator[tuple[str, Tensor, str]]:
    """Yield (name, tensor, type) for each tensor; rows that the type's blocks do not divide take `fallback`."""
    spec = model.spec
    architecture = str(metadata_from_spec(spec, "")["general.architecture"])
    found = rules(architecture, spec)
    if spec.tied:
        found = [rule for rule in found if rule.ours != ("unembedding.weight",)]
    weights = export_weights(model, found)
    rope = spec.blocks[0].mixer.position  # type: ignore[attr-defined]
    if rope.scaling is not None:
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
    metadata = metadata_from_spec(model.spec, Path(path).stem) | dict(tokenizer_metadata or {})
    write(Path(path), metadata, export_tensors(model, kind, fallback))
