"""Scenarios of six emotions, and what SmolLM2 holds after reading them in the template for concepts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from paperworks.data.text.texts import load_records
from paperworks.interpret.probing.representation_reading import concept_prompt
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2

CONTRASTS = (("happiness", "sadness"), ("anger", "surprise"), ("fear", "disgust"))


def scenarios(emotion: str, count: int, seed: int) -> list[str]:
    """Draw scenarios of an emotion; raises AssetUnavailable when they cannot be had."""
    rows = load_records(f"emotions/{emotion}", download=True).rows
    return random.Random(seed).sample(rows, min(count, len(rows)))


@dataclass(frozen=True)
class Sides:
    """States at the last token of prompts about one emotion and about another, by layer; pairs are unrelated."""

    layers: tuple[int, ...]
    positive: Float[Tensor, "layers n dim"]
    negative: Float[Tensor, "layers n dim"]

    def at(self, layer: int, rows: slice) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows dim"]]:
        """Return some rows of both sides after one block."""
        place = self.layers.index(layer)
        return self.positive[place, rows], self.negative[place, rows]


def reading_layers(lab: Lab) -> tuple[int, ...]:
    """Return every third block: outputs of blocks 3, 6 ... 30, counted from 1."""
    return tuple(range(2, lab.pick(smoke=6, small=30), 3))


_READINGS: dict[tuple[object, ...], Sides] = {}


def read_contrast(lab: Lab, positive: str, negative: str, count: int) -> Sides:
    """Record `count` scenarios of each emotion, all in the template of the first; kept for the next claim."""
    key = (lab.scale, lab.seed, lab.device, positive, negative, count)
    if key not in _READINGS:
        model = emotion_model(lab)
        layers = reading_layers(lab)
        sides = []
        for emotion in (positive, negative):
            prompts = [concept_prompt(positive, text) for text in scenarios(emotion, count, lab.seed)]
            sides.append(statements.last_states(lab, model, prompts, layers, f"scenarios of {emotion}"))
        _READINGS[key] = Sides(layers, *sides)
    return _READINGS[key]


_MODELS: dict[tuple[object, ...], DecoderModel] = {}


def emotion_model(lab: Lab) -> DecoderModel:
    """Return SmolLM2, loaded once, or six blocks of random weights in a smoke run; to be left as it was."""
    key = (lab.scale, lab.seed, lab.device)
    if key not in _MODELS:
        _MODELS[key] = smollm2(lab, smoke_depth=6)
    return _MODELS[key]
