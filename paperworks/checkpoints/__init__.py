"""Weights in and out: our own layout, Hugging Face's, GGUF."""

from pathlib import Path

import torch

from paperworks.checkpoints.gguf.model import load_gguf, save_gguf
from paperworks.checkpoints.gguf.reader import read as read_gguf
from paperworks.checkpoints.huggingface import from_transformers, huggingface_names, load_folder, save_folder
from paperworks.checkpoints.native import load_native, save_native
from paperworks.models import DecoderModel

__all__ = [
    "from_transformers",
    "huggingface_names",
    "load",
    "load_folder",
    "load_gguf",
    "load_native",
    "read_gguf",
    "save_folder",
    "save_gguf",
    "save_native",
]


def load(path: Path, dtype: torch.dtype | None = None, keep_quantized: bool = False) -> DecoderModel:
    """Load a .gguf file, or a folder in our layout or Hugging Face's; `paperworks.load` adds the tokenizer.

    Raises:
        FileNotFoundError: when nothing is there, or the folder holds no weights.
        ValueError: for a pickle, or an architecture we do not read.
        CorruptFile: for a file that is truncated, damaged or hostile.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return load_gguf(read_gguf(path), dtype, origin=str(path), keep_quantized=keep_quantized)
        raise ValueError(
            f"{path} is not a .gguf file. Other weights are loaded by their folder (config.json or spec.json beside "
            "safetensors). A pickle (.bin, .pt, .pth) is never executed: read it with "
            "torch.load(path, weights_only=True) and save the tensors with safetensors.torch.save_file"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder at {path}")
    if keep_quantized:
        raise ValueError("keep_quantized reads GGUF files; a folder is loaded as it is (compress.apply compresses it)")
    if (path / "spec.json").exists():
        out: DecoderModel = load_native(path, dtype)
        return out
    if (path / "config.json").exists():
        return load_folder(path, dtype)
    raise FileNotFoundError(
        f"{path} holds no model: expected spec.json (ours) or config.json (Hugging Face) beside safetensors files"
    )
