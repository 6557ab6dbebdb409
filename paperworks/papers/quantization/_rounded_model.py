"""SmolLM2 in a weight format, scored on texts that the seed of a run draws: the bench of several papers here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks import compress, train
from paperworks.compress import WeightFormat
from paperworks.compress.calibration.calibration import Calibration
from paperworks.core.errors import AssetUnavailable
from paperworks.data.text.texts import PYTHON_DOCS, load_records, load_text
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2

SCORED_SHARE = 0.3  # of the play, from its end, is scored on; what comes before is calibrated with
EMBEDDED = "embedding.weight"


@dataclass(frozen=True)
class Bench:
    """The model as loaded, which is never changed, and the texts it is scored on and calibrated with.

    Args:
        scored: windows to score on, half of them Shakespeare and half word problems; none of it is calibrated with.
        calibrated: windows to calibrate with, of the same two kinds.
        length: tokens of a window.
        targets: the layers that are rounded.
    """

    model: DecoderModel
    tokenizer: Any
    scored: int
    calibrated: int
    length: int
    targets: str | list[str]
    device: str = "cpu"
    kept: dict[Any, Any] = field(default_factory=dict)  # losses of the dense model by seed, formats that calibrate not

    @property
    def words(self) -> str:
        """Description of the scored texts, for a note."""
        return (
            f"Scored on {self.scored} windows of {self.length} tokens drawn by the seed, half Shakespeare, half GSM8K; "
            f"formats that calibrate see {self.calibrated} other windows; embeddings stay as they are"
        )

    def texts(self, seed: int) -> Int[Tensor, "windows length"]:
        """Windows to score on, drawn by the seed."""
        return _windows(self.tokenizer, True, self.scored, self.length, seed).to(self.device)

    def calibration(self, seed: int) -> list[Int[Tensor, "1 length"]]:
        """Windows to calibrate with, drawn by the seed from texts that are never scored."""
        return list(_windows(self.tokenizer, False, self.calibrated, self.length, seed).to(self.device).split(1))

    def loss(self, model: Any, seed: int) -> float:
        """Nats a token on the texts of a seed."""
        return train.evaluate(model, train.next_token_loss, self.texts(seed).split(1))["loss"]

    def dense_loss(self, seed: int) -> float:
        """Nats a token of the model as loaded."""
        if ("dense", seed) not in self.kept:
            self.kept["dense", seed] = self.loss(self.model, seed)
        return self.kept["dense", seed]

    def copy(self) -> DecoderModel:
        """Copy of the model to change; the embedding, which no format touches, is shared."""
        embedding = self.model.get_parameter(EMBEDDED)
        return copy.deepcopy(self.model, {id(embedding): embedding})

    def rounded(self, format: WeightFormat, seed: int, *, sequential: bool = True, decoded: bool = True) -> Any:
        """Copy of the model with its layers in a format.

        Args:
            format: calibrated on the texts of the seed where it learns from data.
            seed: of the calibration.
            sequential: later layers see the rounded earlier ones, as in `Calibration`.
            decoded: weights are decoded once and multiplied as plain ones: quicker, and equal for formats that only
                round weights.
        """
        if format.needs:
            calibration = Calibration(self.calibration(seed), sequential=sequential)
            model = compress.apply(self.copy(), format, self.targets, calibration=calibration)
            return compress.decompress(model) if decoded else model
        if format not in self.kept:
            self.kept[format] = compress.apply(self.copy(), format, self.targets)
        model = self.kept[format]
        return compress.decompress(copy.deepcopy(model)) if decoded else model

    def numbers(self, model: Any, seed: int) -> dict[str, float]:
        """Perplexity of a model on the texts of a seed, and the nats a token it lost against the model as loaded."""
        loss = min(self.loss(model, seed), 50.0)  # a broken model's perplexity stays finite
        return {"perplexity": math.exp(loss), "nats lost": loss - self.dense_loss(seed)}

    def arm(self, format: WeightFormat | None, **how: bool) -> Callable[[int], dict[str, float]]:
        """Arm of a comparison: the numbers of the model in a format, or as loaded."""

        def run(seed: int) -> dict[str, float]:
            return self.numbers(self.model if format is None else self.rounded(format, seed, **how), seed)

        return run


def bench(
    lab: Lab,
    *,
    scored: int = 4,
    calibrated: int = 8,
    length: int = 128,
    blocks: Iterable[int] | None = None,
    part: str = "*",
) -> Bench:
    """Load SmolLM2; in a smoke run a small stand-in, one layer of which is rounded, and two short windows.

    `blocks` are those whose linear layers are rounded, default all 30, and `part` the pattern of those within a block.
    """
    model = _loaded(lab.device) if lab.scale != "smoke" else smollm2(lab)
    model, tokenizer = copy.copy(model), model.tokenizer
    model.tokenizer = None  # copies of the model need none
    return Bench(
        model=model,
        tokenizer=tokenizer,
        scored=lab.pick(smoke=2, small=scored, large=32 * scored),
        calibrated=lab.pick(smoke=2, small=calibrated, large=32 * calibrated),
        length=lab.pick(smoke=16, small=length),
        targets=lab.pick(smoke="blocks.0.mixer.query", small=_layers_of(blocks, part)),
        device=lab.device,
    )


def _layers_of(blocks: Iterable[int] | None, part: str) -> str | list[str]:
    return "all-linear" if blocks is None else [f"blocks.{number}.{part}" for number in blocks]


@cache
def _loaded(device: str) -> DecoderModel:
    return smollm2(Lab(device=device))


def _windows(tokenizer: Any, scored: bool, count: int, length: int, seed: int) -> Int[Tensor, "count length"]:
    """Windows in turn from the play and from word problems, each from a place drawn by the seed."""
    draws = torch.Generator().manual_seed(seed)
    texts = _texts(scored)
    rows = []
    for index in range(count):
        text = texts[index % len(texts)]
        room = 8 * length  # characters; a token has four or so
        start = int(torch.randint(len(text) - room, (), generator=draws))
        start = text.index("\n", start) + 1 if "\n" in text[start : start + room // 4] else start
        rows.append(torch.tensor(tokenizer.encode(text[start : start + room], bos=False)[:length]))
    return torch.stack(rows)


@cache
def _texts(scored: bool) -> tuple[str, ...]:
    try:
        play = load_text("tinyshakespeare").text
        problems = load_records("gsm8k-test" if scored else "gsm8k-train").rows
    except AssetUnavailable:
        return (_part(load_text(PYTHON_DOCS).text, scored),)
    return _part(play, scored), "\n\n".join(row["question"] for row in problems)


def _part(text: str, scored: bool) -> str:
    border = int(len(text) * (1 - SCORED_SHARE))
    return text[border:] if scored else text[:border]
