"""Multiple-choice questions, answered by the likeliest continuation: which country a city is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.core.errors import AssetUnavailable
from paperworks.data.text.texts import load_records

OPTIONS = 4


@dataclass(frozen=True)
class Choice:
    """A beginning, how it may go on, and which of these is right; all as tokens."""

    beginning: Sequence[int]
    options: Sequence[Sequence[int]]
    right: int


def choices(tokenizer: Any, count: int, seed: int) -> tuple[list[Choice], str]:
    """Questions about cities and, in words, what they are; none where the cities are not on this machine."""
    try:
        rows = [row for row in load_records("truth/cities").rows if row["label"] == "1"]
    except AssetUnavailable:
        return [], "no questions (the cities are not on this machine)"
    draws = torch.Generator().manual_seed(seed)
    countries = sorted({row["country"] for row in rows})
    found = []
    for index in torch.randperm(len(rows), generator=draws)[:count].tolist():
        row = rows[index]
        others = [country for country in countries if country != row["country"]]
        wrong = [others[i] for i in torch.randperm(len(others), generator=draws)[: OPTIONS - 1].tolist()]
        right = int(torch.randint(OPTIONS, (), generator=draws))
        options = [*wrong[:right], row["country"], *wrong[right:]]
        found.append(
            Choice(
                tokenizer.encode(f"The city of {row['city']} is in", bos=False),
                [tokenizer.encode(f" {option}.", bos=False) for option in options],
                right,
            )
        )
    return found, f"{len(found)} questions in which of four countries a city is (Truth is Universal)"


@torch.no_grad()
def answered(model: nn.Module, asked: Sequence[Choice]) -> float:
    """The share of questions whose right option has the highest mean log probability a token."""
    rows = [[*choice.beginning, *option] for choice in asked for option in choice.options]
    starts = [len(choice.beginning) for choice in asked for _ in choice.options]
    scores: list[float] = [0.0] * len(rows)
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for indices in by_length.values():  # equal lengths together: nothing has to be padded
        for some in torch.tensor(indices).split(64):
            tokens = torch.tensor([rows[i] for i in some.tolist()], device=device)
            log = _picked(model(tokens), tokens)
            for place, i in enumerate(some.tolist()):
                scores[i] = float(log[place, starts[i] - 1 :].mean())
    best = torch.tensor(scores).view(len(asked), -1).argmax(1)
    return float((best == torch.tensor([choice.right for choice in asked])).float().mean())


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log probability of each token but the first."""
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
