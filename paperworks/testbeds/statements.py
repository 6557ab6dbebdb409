"""True and false statements, and what SmolLM2 holds at their last token: read once for several papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks import interpret
from paperworks.data.text.texts import load_records
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2

TOPICS = ("cities", "sp_en_trans", "inventors", "animal_class", "element_symb", "facts")
BATCH = 16  # statements of equal length in one forward pass


@dataclass(frozen=True)
class Statements:
    """Statements of one data set (a topic in one polarity) with their truth."""

    name: str
    texts: tuple[str, ...]
    true: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.texts)


def paired(topic: str, count: int, seed: int) -> tuple[Statements, Statements]:
    """`count` affirmative statements of a topic, half of them true, and the negation of each, row by row.

    Raises:
        AssetUnavailable: when the data set cannot be had.
    """
    plain = load_records(f"truth/{topic}", download=True).rows
    negated = load_records(f"truth/neg_{topic}", download=True).rows
    labels = torch.tensor([int(row["label"]) for row in plain])
    opposite = torch.tensor([int(row["label"]) for row in negated])
    fitting = (labels + opposite == 1).nonzero().flatten()  # rows that do negate each other
    draws = torch.Generator().manual_seed(seed)
    shuffled = fitting[torch.randperm(len(fitting), generator=draws)]
    half = min(count // 2, int((labels[fitting] == 1).sum()), int((labels[fitting] == 0).sum()))
    rows = torch.cat([shuffled[labels[shuffled] == value][:half] for value in (1, 0)]).tolist()
    true = labels[rows] == 1
    return (
        Statements(topic, tuple(plain[row]["statement"] for row in rows), true),
        Statements(f"neg_{topic}", tuple(negated[row]["statement"] for row in rows), ~true),
    )


def last_states(
    lab: Lab, model: DecoderModel, texts: Sequence[str], layers: Sequence[int], description: str
) -> Float[Tensor, "layers texts dim"]:
    """The residual stream after some blocks at the last token of each text (float32, on the CPU)."""
    tokenizer: Any = model.tokenizer
    prompts = [tokenizer.encode(text) for text in texts]
    paths = [f"blocks.{layer}" for layer in layers]
    # A bar needs steps: a few chunks, each of which groups equal lengths.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    chunks = [order[start : start + 64] for start in range(0, len(order), 64)]
    states = torch.empty(len(paths), len(texts), model.spec.dim)
    for chunk in lab.track(chunks, description):
        found = interpret.last_token_activations(
            model, [prompts[row] for row in chunk], paths, batch=BATCH, forward=model.hidden
        )
        states[:, chunk] = torch.stack([found[path].float().cpu() for path in paths])
    return states


@dataclass(frozen=True)
class Seen:
    """What SmolLM2 holds at the end of each statement of every topic, in both polarities."""

    layers: tuple[int, ...]
    sets: dict[str, Statements]
    states: dict[str, Float[Tensor, "layers n dim"]]

    def at(self, names: Sequence[str], layer: int) -> Float[Tensor, "n dim"]:
        """The activations of some data sets after a block, in that order."""
        place = self.layers.index(layer)
        return torch.cat([self.states[name][place] for name in names])

    def true(self, names: Sequence[str]) -> Bool[Tensor, " n"]:
        """The truth of the same statements."""
        return torch.cat([self.sets[name].true for name in names])

    def affirmative(self, names: Sequence[str]) -> Bool[Tensor, " n"]:
        """Which of the same statements are not negated."""
        return torch.cat([torch.full((len(self.sets[name]),), not name.startswith("neg_")) for name in names])

    def groups(self, names: Sequence[str]) -> list[str]:
        """The data set of each of the same statements."""
        return [name for name in names for _ in range(len(self.sets[name]))]


def depth(lab: Lab) -> int:
    """How many blocks the model of this run has."""
    return lab.pick(smoke=4, small=30)


# By what decides it: recording takes most of a paper's time, and several claims read the same statements.
_READINGS: dict[tuple[object, ...], Seen] = {}


def read_statements(lab: Lab, per_set: int = 80) -> Seen:
    """Record all six topics in both polarities after every second block; kept in memory for the next claim."""
    per_set = lab.pick(smoke=12, small=per_set)
    topics = lab.pick(smoke=TOPICS[:3], small=TOPICS)
    key = (lab.scale, lab.seed, lab.device, per_set)
    if key not in _READINGS:
        model = smollm2(lab, smoke_depth=depth(lab))
        layers = tuple(range(1, depth(lab), 2))
        sets = {part.name: part for topic in topics for part in paired(topic, per_set, lab.seed)}
        texts = [text for part in sets.values() for text in part.texts]
        states = last_states(lab, model, texts, layers, "statements through SmolLM2")
        parts = states.split([len(part) for part in sets.values()], dim=1)
        _READINGS[key] = Seen(layers, sets, dict(zip(sets, parts, strict=True)))
    return _READINGS[key]
