"""Training on a task of memory and counting what is remembered: what the papers of recurrent mixers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Feedforward, Mixer, RMSNorm
from paperworks.testbeds.training import fit
from paperworks.train.losses import IGNORED


class Task(Protocol):
    """What draws batches of "tokens" and "targets"."""

    @property
    def vocab_size(self) -> int:
        """Ids there are."""

    def draw(self, rows: int, draws: torch.Generator) -> dict[str, Tensor]:
        """A batch of so many rows."""


def small(
    task: Task, mixer: Mixer, *, dim: int = 64, depth: int = 2, feedforward: Feedforward | None = None
) -> Decoder:
    """A small pre-norm model of one kind of mixer."""
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=feedforward)
    return Decoder(vocab_size=task.vocab_size, dim=dim, depth=depth, block=block, norm=RMSNorm())


def taught(
    lab: Lab,
    spec: Decoder,
    task: Task,
    steps: int,
    seed: int,
    *,
    rows: int = 32,
    lr: float = 3e-3,
    every: int = 50,
    look: Callable[[int, DecoderModel], Any] | None = None,
) -> DecoderModel:
    """Train a model on fresh rows of a task: AdamW without decay, clip 1, a constant rate after 5% of warm-up."""
    model = spec.build()

    def batches(epoch: int) -> Any:
        draws = lab.generator(1_000 * seed + epoch)
        return (task.draw(rows, draws) for _ in range(steps))

    def step(number: int) -> None:
        if look is not None and number % every == 0:
            model.eval()
            look(number, model)
            model.train()

    adam = train.AdamW(weight_decay=0.0)
    with lab.threads(1):
        fit(
            model, train.next_token_loss, batches, steps=steps, lr=lr, seed=seed,
            optimizer=adam, schedule="constant", warmup=0.05, on_step=step,
        )  # fmt: skip
    return model.eval()


@torch.no_grad()
def remembered(model: nn.Module, task: Task, rows: int, seed: int = 99) -> float:
    """The share of asked tokens that are right, on rows not trained on."""
    batch = task.draw(rows, torch.Generator().manual_seed(seed))
    asked = batch["targets"] != IGNORED
    said = model(batch["tokens"]).argmax(-1)
    return (said == batch["targets"])[asked].float().mean().item()
