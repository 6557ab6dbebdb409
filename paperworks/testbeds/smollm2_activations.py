"""Activations of SmolLM2's middle layer, and six kinds of sparse autoencoder trained on them from one buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import train
from paperworks.interpret import sae
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2

TAP = "blocks.15"  # the residual stream after the middle of 30 blocks
CONTEXT = 128
HELD_OUT_EVERY = 16  # every 16th context is kept to measure on
BATCH = 256


@dataclass(frozen=True)
class Setting:
    """The model, one buffer's rows to train on and to measure on, and contexts to splice into."""

    model: DecoderModel
    tap: str
    rows: Float[Tensor, "rows dim"]
    held_out: Float[Tensor, "rows dim"]
    contexts: list[Tensor]
    factor: float  # what rows were multiplied with: the model's own activations are smaller by it
    longest: float  # activations beyond it are left out and pass the splice
    words: str

    @property
    def dim(self) -> int:
        """Size of the activations, which is also the mean of their ||x||^2."""
        return self.rows.shape[1]


def setting(lab: Lab) -> Setting:
    """Run the model over some text once.

    The first token of each context is left out everywhere, and so are the few others that are as large: longer than
    five times the median.
    """
    model = smollm2(lab).eval()
    tap = lab.pick(smoke="blocks.0", small=TAP)
    text = scored_text(model.tokenizer, lab.pick(smoke=64 * CONTEXT, small=256 * CONTEXT))
    contexts = text.tokens.view(-1, CONTEXT)
    # Both kinds of text in every batch, for memory holds fewer contexts than there are.
    contexts = contexts[torch.randperm(len(contexts), generator=torch.Generator().manual_seed(lab.seed))]
    kept = torch.arange(len(contexts)) % HELD_OUT_EVERY == 0
    shown, hidden = list(contexts[~kept].split(8)), list(contexts[kept].split(8))
    longest = 5 * sae.Activations(model, tap, shown[:2]).median_length(1024)
    with lab.progress("activations of SmolLM2", len(shown)) as advance:

        def counted() -> Iterator[Tensor]:
            for batch in shown:
                yield batch.to(lab.device)
                advance(1)

        capacity = lab.pick(smoke=2048, small=16_384)
        buffer = sae.Activations(model, tap, counted, size=BATCH, capacity=capacity, longest=longest)
        rows = buffer.gather(contexts.numel())
    factor = (rows.shape[1] / float(rows.square().sum(dim=1).mean())) ** 0.5
    held_out = torch.cat(list(sae.Activations(model, tap, hidden, factor=factor, longest=longest).rows()))
    spliced = lab.pick(smoke=[hidden[0][:1, :32]], small=[hidden[0][:4]])
    return Setting(model, tap, rows.mul_(factor), held_out, spliced, factor, longest, text.words)


@dataclass(frozen=True)
class Point:
    """One autoencoder on the frontier."""

    kind: str
    strength: float
    l0: float
    fvu: float
    recovered: float
    dead: float


def fitted(
    lab: Lab,
    where: Setting,
    spec: sae.SparseAutoencoderSpec,
    *,
    steps: int,
    lr: float,
    beta1: float = 0.9,
    clip: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> sae.SparseAutoencoder:
    """Train one autoencoder on the buffer's rows; `scale` is what a kind wants them multiplied with."""
    torch.manual_seed(seed)
    model = spec.build(where.dim).to(where.rows.device)
    model.centre(scale * where.rows[:2048])
    training = sae.Training(model, steps, betas=(beta1, 0.999))
    settings = train.Settings(
        steps=steps,
        lr=lr,
        optimizer=train.AdamW(betas=(beta1, 0.999), weight_decay=0.0),
        schedule=train.WarmupStableDecay(decay=0.2),
        warmup=0.05,
        min_lr=0.0,
        clip=clip,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )

    def batches(epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(where.rows), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for part in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield scale * where.rows[part]

    train.fit(model, training.loss, batches, settings, on_step=training.after_step)
    model.rescale(1 / scale)
    return model.eval()
