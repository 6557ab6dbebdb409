"""Prompts that ask SmolLM2 for the capital of a country, in pairs that correspond token by token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.interpret.circuits.patching import aligned
from paperworks.lab import Lab
from paperworks.models import DecoderModel

# Countries and capitals that are one token each in SmolLM2's vocabulary.
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
    "Japan": "Tokyo",
}
WORDS = ("The", "capital", "of", "France", "is", "the", "city", "of")
SUBJECT, OTHER_WORD, LAST = 3, 6, 7  # positions of the country, of "city", and of the last word


def capital_pairs(
    lab: Lab, model: DecoderModel
) -> tuple[Int[Tensor, "pairs 8"], Int[Tensor, "pairs 8"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Prompts, the same with another country (symmetric token replacement), and the capitals of both."""
    tokenizer: Any = model.tokenizer
    names = list(CAPITALS.items())[: lab.pick(smoke=2, small=6)]
    prompts = [f"The capital of {country} is the city of" for country, _ in names]
    clean, corrupted = aligned(prompts, prompts[1:] + prompts[:1], tokenizer)
    answer = torch.tensor([tokenizer.encode(f" {city}")[0] for _, city in names])
    device = model.device
    return clean.to(device), corrupted.to(device), answer.to(device), answer.roll(-1).to(device)
