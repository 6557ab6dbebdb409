"""SmolLM2, on which many claims are checked, and a small stand-in for runs that only see whether the code runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from paperworks import api, checkpoints
from paperworks.data.assets import assets
from paperworks.data.tokenizers.tokenizer import Tokenizer
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.models.presets.families import llama

PROVENANCE = (
    "The weights at hand are not the published ones: the public file of SmolLM2-135M-Instruct that is used here holds "
    "them rounded to Q4_1 (16 levels in groups of 32), and every format here rounds these once more. "
)


def smollm2(lab: Lab, smoke_depth: int = 1) -> DecoderModel:
    """SmolLM2-135M-Instruct with its tokenizer; in a smoke run random weights in its shape, a third as wide.

    Args:
        lab: says the scale and the device.
        smoke_depth: how many blocks a smoke run has, out of 30.

    Raises:
        AssetUnavailable: when the file cannot be had; the stand-in has its tokenizer.
    """
    if lab.scale != "smoke":
        return api.load("smollm2", device=lab.device)
    lab.text("In this smoke run", "random weights stand in for SmolLM2: it shows that the code runs, and nothing more")
    return stand_in(smoke_depth, lab.seed).to(lab.device)


def stand_in(depth: int = 30, seed: int = 0) -> DecoderModel:
    """Random weights in SmolLM2's shape, a third as wide, with its tokenizer."""
    spec = llama(192, depth, 6, 256, kv_heads=3, vocab_size=49_152, context=8192, eps=1e-5, tied=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.build().eval()
    model.tokenizer = _tokenizer()
    return model


@cache
def _tokenizer() -> Any:
    return Tokenizer.from_gguf(checkpoints.read_gguf(assets.fetch("smollm2")).metadata)
