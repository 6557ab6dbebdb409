"""Scenarios of six emotions, and the model that reads them."""

from __future__ import annotations

import random

from paperworks.data.text.texts import load_records
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2


def scenarios(emotion: str, count: int, seed: int) -> list[str]:
    """Draw scenarios of an emotion; raises AssetUnavailable when they cannot be had."""
    rows = load_records(f"emotions/{emotion}", download=True).rows
    return random.Random(seed).sample(rows, min(count, len(rows)))


_MODELS: dict[tuple[object, ...], DecoderModel] = {}


def emotion_model(lab: Lab) -> DecoderModel:
    """SmolLM2, loaded once for all seeds, or six blocks of random weights in a smoke run; to be left as it was."""
    key = (lab.scale, lab.device)
    if key not in _MODELS:
        _MODELS[key] = smollm2(lab, smoke_depth=6)
    return _MODELS[key]
