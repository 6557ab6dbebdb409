"""The text on which compressed language models are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.core.errors import AssetUnavailable
from paperworks.data.text.texts import PYTHON_DOCS, load_records, load_text


@dataclass(frozen=True)
class ScoredText:
    """Tokens to score a model on, and what they are, in words."""

    tokens: Int[Tensor, " time"]
    words: str


def scored_text(tokenizer: Any, count: int) -> ScoredText:
    """`count` tokens, half Shakespeare, half word problems; of Python's documentation where they are missing."""
    try:
        parts = [load_text("tinyshakespeare").text, _questions(count)]
        words = ", half Shakespeare, half word problems of GSM8K"
    except AssetUnavailable:
        parts = [load_text(PYTHON_DOCS).text]
        words = " of Python's documentation (the texts usually taken are not on this machine)"
    rows: list[int] = []
    for done, part in enumerate(parts, 1):
        # Eight characters a token are more than any part needs, and spare encoding all of it.
        rows += tokenizer.encode(part[: 8 * count], bos=False)[: count * done // len(parts) - len(rows)]
    if len(rows) < count:
        raise ValueError(f"the texts give {len(rows)} tokens, {count} were asked for")
    return ScoredText(torch.tensor(rows), f"{count:,} tokens{words}")


def _questions(count: int) -> str:
    rows = load_records("gsm8k-test").rows
    return "\n\n".join(row["question"] for row in rows[: max(8, count // 20)])  # some 50 tokens each
