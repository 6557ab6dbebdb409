"""What a user types first: load, generate, chat, save, export. The only place that joins weights with tokenizers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from paperworks import checkpoints
from paperworks.core.errors import unknown
from paperworks.generation import generate
from paperworks.models import (
    Decoder,
    DecoderModel,
    Encoder,
    EncoderModel,
    ModelSpec,
    Seq2Seq,
    Seq2SeqModel,
    TokenStack,
    count_parameters,
    preset,
)
from paperworks.models.model import parts_of
from paperworks.models.presets.families import presets

__all__ = ["build", "chat", "count_parameters", "export", "generate", "load", "preset", "presets", "save"]


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    keep_quantized: bool = False,
) -> DecoderModel:
    """Load a model and its tokenizer.

    Args:
        name: an asset's name ("smollm2"), a folder (ours or Hugging Face's layout), a .gguf file, or "org/name" on the
            hub (needs the `hub` extra and a network).
        dtype: of the weights; None takes the checkpoint's own (float32 for GGUF).
        device: where the model goes; None leaves it on the CPU.
        keep_quantized: for GGUF, keep the linear layers in the file's own blocks.

    Returns:
        The model in evaluation mode; `.spec` is the value it was built from, `.tokenizer` is None where there is none.

    Raises:
        AssetUnavailable: when the files cannot be had on this machine; says how to provide them.
        FileNotFoundError, ValueError, CorruptFile: when they are not what the name promises.
    """
    path = _locate(str(name))
    model = checkpoints.load(path, dtype, keep_quantized)
    tokenizer = _tokenizer(path)
    model.tokenizer = tokenizer
    spec: Any = model.spec
    stacks = [part for part in parts_of(spec) if isinstance(part, TokenStack)]
    known = min((part.vocab_size for part in stacks), default=0)
    if tokenizer is not None and stacks and tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer of {path} knows {tokenizer.vocab_size} tokens, the model only {known}: "
            "they do not belong together"
        )
    return model if device is None else model.to(device)


def _locate(name: str) -> Path:
    from paperworks.data.assets import assets

    path = Path(name).expanduser()
    if name in assets.names():
        return assets.fetch(name)
    if path.exists() or path.suffix or name.startswith((".", "/", "~")):
        return path
    if name.count("/") == 1:
        return assets.fetch_from_hub(name)
    hint = " It is a preset, which has no weights: paperworks.build(paperworks.preset(name)) makes random ones."
    message = unknown("model", name, assets.names())
    raise ValueError(
        f"{message}; or a folder, a .gguf file, or 'org/name' on the hub.{hint if name in presets() else ''}"
    )


def _tokenizer(path: Path) -> Any:
    from paperworks.data.tokenizers.tokenizer import Tokenizer

    if path.suffix == ".gguf":
        metadata = checkpoints.read_gguf(path).metadata
        return Tokenizer.from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    return Tokenizer.from_folder(path) if (path / "tokenizer.json").exists() else None


@overload
def build(spec: Decoder) -> DecoderModel: ...
@overload
def build(spec: Encoder) -> EncoderModel: ...
@overload
def build(spec: Seq2Seq) -> Seq2SeqModel: ...
@overload
def build(spec: ModelSpec) -> Any: ...
def build(spec: ModelSpec) -> Any:
    """Build a model of any kind from its spec, with fresh weights (`torch.manual_seed` makes them reproducible).

    Raises `TypeError` for what is no spec of a whole model: a part has no input and no head.
    """
    if not isinstance(spec, ModelSpec):
        hint = f"paperworks.build(paperworks.preset({spec!r}))" if isinstance(spec, str) else "a Decoder, say"
        raise TypeError(f"build needs the spec of a whole model, got {type(spec).__name__}; give {hint}")
    return spec.build()


def chat(model: nn.Module, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
    """The model's answer to a conversation, `[{"role": "user", "content": "Hello"}]`.

    Settings are `generate`'s. Raises `ValueError` when the model has no chat template, or messages are malformed.
    """
    out: str = generate(model, chat_prompt(model, messages), **settings).strip()
    return out


def chat_prompt(model: nn.Module, messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation as the text that the model was trained to continue with its answer."""
    from paperworks.data.chat.template import render

    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the model has no chat template: it was not trained to chat; use generate with a plain prompt")
    variables = {
        "bos_token": tokenizer.special.bos or "",
        "eos_token": tokenizer.special.eos or "",
    }
    return render(tokenizer.chat_template, messages, add_generation_prompt=True, **variables)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a model of any kind in our own layout: spec, weights and tokenizer.

    The folder appears whole or not at all. Raises `FileExistsError` for a folder that holds anything: nothing is
    overwritten.
    """
    checkpoints.save_native(model, folder)


def export(
    model: DecoderModel,
    path: str | Path,
    layout: Literal["huggingface", "gguf"] = "huggingface",
    *,
    kind: str = "F16",
    fallback: str = "F16",
) -> None:
    """Write the model for other programs.

    Args:
        model: ours, without adapters.
        path: the folder ("huggingface") or the file ("gguf").
        layout: "huggingface" (config.json, safetensors, tokenizer.json) or "gguf".
        kind: for GGUF, the type of matrices: "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q4_0" ...
        fallback: for GGUF, the type of matrices whose rows the blocks of `kind` do not divide.

    Raises:
        ValueError: when the layout cannot express the model.
    """
    if layout == "huggingface":
        checkpoints.save_folder(model, path)
    elif layout == "gguf":
        from paperworks.data.tokenizers.tokenizer import Tokenizer

        tokenizer = model.tokenizer
        metadata = tokenizer.gguf_metadata() if isinstance(tokenizer, Tokenizer) else {}
        checkpoints.save_gguf(model, path, kind, fallback=fallback, tokenizer_metadata=metadata)
    else:
        raise ValueError(unknown("layout", str(layout), ["huggingface", "gguf"]))
