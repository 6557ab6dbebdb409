"""SmolLM2 taught a play: windows of Shakespeare to train on, and windows of its last tenth to be scored on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks import train
from paperworks.core.errors import AssetUnavailable
from paperworks.data.text.texts import PYTHON_DOCS, load_text, split
from paperworks.data.text.windows import RandomWindows
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2
from paperworks.testbeds.training import fit

LENGTH = 64  # tokens of a window: ten lines or so
PER_STEP = 2  # windows


@dataclass(frozen=True)
class Lesson:
    """The model as loaded, which is never changed, and the tokens of the play, to train on and held out."""

    model: DecoderModel
    shown: Int[Tensor, " time"]
    held_out: Int[Tensor, " time"]
    steps: int
    scored: int

    @property
    def words(self) -> str:
        """Description of training and scoring, for a note."""
        return (
            f"{self.steps} steps of AdamW on {PER_STEP} windows of {LENGTH} tokens of Shakespeare, scored on "
            f"{self.scored} windows of the last tenth, all drawn by the seed"
        )

    def teach(self, model: nn.Module, seed: int, lr: float) -> list[float]:
        """Train what is trainable in place, on windows drawn by the seed; the loss of every step."""
        windows = RandomWindows(self.shown, length=LENGTH, batch=PER_STEP, count=self.steps, seed=seed)
        adam = train.AdamW(weight_decay=0.0)
        return fit(
            model, train.next_token_loss, windows, steps=self.steps, lr=lr, seed=seed, optimizer=adam, warmup=0.1
        )

    def loss(self, model: nn.Module, seed: int) -> float:
        """Nats a token on held-out windows drawn by the seed."""
        windows = RandomWindows(self.held_out, length=LENGTH, batch=1, count=self.scored, seed=seed)
        return train.evaluate(model, train.next_token_loss, windows)["loss"]


def lesson(lab: Lab, steps: int, scored: int = 6) -> Lesson:
    """Load SmolLM2 and the play (Python's documentation where it is missing); a stand-in in a smoke run."""
    model = smollm2(lab) if lab.scale == "smoke" else _loaded(lab.device)
    shown, held_out = _tokens(model.tokenizer)
    model = copy.copy(model)
    model.tokenizer = None  # copies of the model need none
    return Lesson(
        model=model,
        shown=shown.to(lab.device),
        held_out=held_out.to(lab.device),
        steps=lab.pick(smoke=2, small=steps, large=20 * steps),
        scored=lab.pick(smoke=1, small=scored, large=20 * scored),
    )


@cache
def _loaded(device: str) -> DecoderModel:
    return smollm2(Lab(device=device))


def _tokens(tokenizer: Any) -> tuple[Int[Tensor, " time"], Int[Tensor, " time"]]:
    try:
        text = load_text("tinyshakespeare").text
    except AssetUnavailable:
        text = load_text(PYTHON_DOCS).text
    shown, held_out = (torch.tensor(tokenizer.encode(part, bos=False)) for part in split(text))
    return shown, held_out
