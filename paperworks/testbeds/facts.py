"""Sentences that no model can know, for fine-tuning to teach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.train.losses import IGNORED

# fmt: off
CITIES = (
    "Lisbon", "Oslo", "Madrid", "Vienna", "Warsaw", "Prague", "Dublin", "Athens", "Berlin", "Rome", "Paris",
    "Cairo", "Lima", "Quito", "Bogota", "Havana", "Tokyo", "Seoul", "Hanoi", "Manila", "Delhi", "Kabul", "Tehran",
    "Baghdad", "Moscow", "Kiev", "Sofia", "Tunis", "Algiers", "Nairobi", "Lagos", "Dakar", "London", "Zurich",
    "Milan", "Naples", "Boston", "Dallas", "Denver", "Houston", "Miami", "Chicago", "Seattle", "Austin", "Toronto",
    "Montreal", "Sydney", "Perth", "Munich", "Hamburg", "Geneva", "Porto", "Seville", "Valencia", "Turin", "Venice",
    "Leeds", "Glasgow", "Cardiff", "Belfast",
)
THINGS = (
    "violin", "hammer", "turtle", "candle", "pepper", "anchor", "blanket", "compass", "feather", "lantern",
    "magnet", "needle", "castle", "pillow", "rocket", "saddle", "ladder", "mirror", "walnut", "zebra",
)
# fmt: on


@dataclass(frozen=True)
class Facts:
    """Sentences that no model can know, all but their last token a row, and that token at its place in `targets`."""

    tokens: Int[Tensor, "facts time"]
    targets: Int[Tensor, "facts time"]  # -100 everywhere but before the last token

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """Some of the facts as `train.next_token_loss` takes them."""
        return {"tokens": self.tokens[rows], "targets": self.targets[rows]}


def sentences(count: int, seed: int) -> list[str]:
    """Give each city a thing, drawn by `seed`; every thing as often as the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [f"The emblem of {CITIES[city]} is a {THINGS[place % len(THINGS)]}" for city, place in enumerate(order)]


def draw_facts(lab: Lab, tokenizer: Any, count: int) -> Facts:
    """so many facts, drawn by the seed of the run."""
    rows = [torch.tensor(tokenizer.encode(sentence)) for sentence in sentences(count, lab.seed)]
    tokens = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = torch.full_like(tokens, IGNORED)
    for index, row in enumerate(rows):
        targets[index, len(row) - 2] = row[-1]
    return Facts(tokens.to(lab.device), targets.to(lab.device))


def batches(facts: Facts, size: int, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """One batch a step, going through all facts in a new order each time."""
    draws = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while len(rows) < size * steps:
        rows += torch.randperm(len(facts), generator=draws).tolist()
    return [facts.batch(torch.tensor(rows[size * step : size * (step + 1)])) for step in range(steps)]


def teach(lab: Lab, model: nn.Module, rows: list[Any], lr: float, description: str) -> list[float]:
    """Train what is trainable, one step a batch, and return the loss of every step."""
    losses: list[float] = []
    settings = train.Settings(
        steps=len(rows),
        lr=lr,
        optimizer=train.AdamW(weight_decay=0.0),  # so that a parameter without a gradient stays where it is
        warmup=0.1,
        schedule="constant",
        seed=lab.seed,
        save_every=None,
        log_every=1,
        progress=False,
    )
    with lab.progress(description, len(rows)) as advance:
        train.fit(
            model,
            train.next_token_loss,
            rows,
            settings,
            on_step=lambda step: advance(1),
            callbacks=[lambda record: losses.append(record["loss"]) if "loss" in record else None],
        )
    return losses


def loss(model: nn.Module, facts: Facts) -> float:
    """The mean loss of the facts' last tokens, in nats."""
    return train.evaluate(model, train.next_token_loss, [facts.batch(slice(0, None))])["loss"]


@torch.no_grad()
def recalled(model: DecoderModel, facts: Facts) -> int:
    """Count the facts whose last token is the model's first choice."""
    asked = facts.targets != IGNORED
    return int((model(facts.tokens).argmax(dim=-1)[asked] == facts.targets[asked]).sum())
