"""SmolLM2 before and after rounding: what several papers of this family measure."""

from __future__ import annotations

import copy
from dataclasses import dataclass
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
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2


@dataclass(frozen=True)
class Subject:
    """The model, the text it is scored on, and other text of the same kinds to calibrate with."""

    model: DecoderModel
    tokens: Int[Tensor, " time"]
    calibration: list[Int[Tensor, "batch time"]]
    context: int
    words: str
    targets: str
    tokenizer: Any = None

    def perplexity(self, format: WeightFormat | None = None, sequential: bool = True, decoded: bool = True) -> float:
        """The perplexity with all linear layers of the blocks in a format, or as they are.

        `decoded` weights are multiplied as plain ones: quicker, and right for formats that only round weights.
        """
        if format is None:
            return train.perplexity(self.model, self.tokens, self.context)
        rounded = self.rounded(format, sequential)
        return train.perplexity(compress.decompress(rounded) if decoded else rounded, self.tokens, self.context)

    def model_copy(self) -> DecoderModel:
        """A copy to change."""
        return copy.deepcopy(self.model)

    def rounded(self, format: WeightFormat, sequential: bool = True) -> Any:
        """A copy of the model in a format, calibrated if the format asks for it."""
        calibration = Calibration(self.calibration, sequential=sequential) if format.needs else None
        return compress.apply(copy.deepcopy(self.model), format, self.targets, calibration=calibration)


def subject(lab: Lab) -> Subject:
    """Load SmolLM2 and its texts; in a smoke run a small stand-in, whose query is rounded, and a few tokens."""
    model = smollm2(lab)
    text = scored_text(model.tokenizer, lab.pick(smoke=32, small=2048, large=65_536))
    batches = _calibration(model.tokenizer, lab.pick(smoke=1, small=8, large=64), lab.pick(smoke=24, small=512))
    tokenizer, model.tokenizer = model.tokenizer, None  # copies of the model need none
    calibrated = sum(batch.numel() for batch in batches)
    return Subject(
        model=model,
        tokens=text.tokens.to(lab.device),
        calibration=[batch.to(lab.device) for batch in batches],
        context=lab.pick(smoke=32, small=513),
        words=f"{text.words}; windows of 512; embeddings stay as they are; {calibrated:,} other tokens of such texts "
        "for formats that calibrate",
        targets=lab.pick(smoke="blocks.0.mixer.query", small="all-linear"),
        tokenizer=tokenizer,
    )


def _calibration(tokenizer: Any, sequences: int, length: int) -> list[Int[Tensor, "1 length"]]:
    """Sequences in turn from the end of Shakespeare and from training problems: none of it is scored."""
    room = 8 * length * sequences  # characters; a token has four or so
    try:
        problems = "\n\n".join(
            row["question"] for row in load_records("gsm8k-train").rows[: sequences * length // 20 + 8]
        )
        texts = [load_text("tinyshakespeare").text[-room:], problems]
    except AssetUnavailable:
        texts = [load_text(PYTHON_DOCS).text[-room:]]
    rows = [torch.tensor(tokenizer.encode(text[:room], bos=False)) for text in texts]
    return [rows[index % len(rows)].narrow(0, index // len(rows) * length, length)[None] for index in range(sequences)]
