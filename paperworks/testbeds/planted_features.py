"""The common experiment of the sparse autoencoders: train one on activations whose directions are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from paperworks import train
from paperworks.interpret import sae
from paperworks.lab import Lab

LATENTS = 256  # as many as there are planted directions
BATCH = 512
SETTING = (
    "256 random directions in 64 dimensions, each on with a chance of 5/256; 256 latents, batches of 512, Adam at 2e-3 "
    "that falls to 0 over the last 20%."
)


@dataclass(frozen=True)
class Trained:
    """An autoencoder, what it was trained on, and how good it is on 20,480 fresh activations."""

    model: sae.SparseAutoencoder
    data: sae.Planted
    quality: sae.Quality
    recovery: sae.Recovery

    @property
    def row(self) -> list[float]:
        """L0, FVU, gamma, MMCS, share recovered, share dead, for a table."""
        quality = self.quality
        return [
            *(quality.l0, quality.fvu, quality.bias),
            *(self.recovery.mmcs, self.recovery.share, quality.dead),
        ]


COLUMNS = ["L0", "FVU", "\u03b3", "MMCS", "recovered", "dead"]


def settings(steps: int, beta1: float = 0.9, clip: float | None = None) -> train.Settings:
    """The one recipe; papers differ in Adam's beta1 and in whether they clip gradients."""
    return train.Settings(
        steps=steps,
        lr=2e-3,
        optimizer=train.AdamW(betas=(beta1, 0.999), weight_decay=0.0),
        schedule=train.WarmupStableDecay(decay=0.2),
        warmup=0,
        min_lr=0.0,
        clip=clip,
        seed=None,  # each run sets it before its model is built
        save_every=None,
        log_every=steps,
        progress=False,
    )


def trained(
    lab: Lab,
    build: Callable[[int], sae.SparseAutoencoder],
    description: str,
    *,
    data: sae.Planted | None = None,
    mean_square: float = 64.0,
    steps: int = 2000,
    beta1: float = 0.9,
    clip: float | None = None,
    centre: bool = False,
    prepare: Callable[[sae.SparseAutoencoder], None] | None = None,
    resampling: Callable[[sae.Planted], sae.Resampling] | None = None,
    watch: Callable[[int, sae.SparseAutoencoder], None] | None = None,
    seed: int | None = None,
) -> Trained:
    """Train an autoencoder on planted activations and measure it.

    build: makes the model for 64 dimensions. data: None is the common one, with this `mean_square`. centre: start b_d
    at the geometric median of a sample. prepare: changes the model before training. resampling: when dead latents are
    revived.
    watch: called after each step. seed: of the planted directions, the weights and the draws; None is the lab's.
    """
    steps = lab.pick(smoke=10, small=steps)
    seed = lab.seed if seed is None else seed
    torch.manual_seed(seed)
    data = data or sae.Planted(mean_square=mean_square, seed=seed)
    model = build(data.dim)
    if centre:
        model.centre(data.draw(8192, torch.Generator().manual_seed(seed + 2)))
    if prepare is not None:
        prepare(model)
    plan = resampling(data) if resampling is not None else None
    training = sae.Training(model, steps, betas=(beta1, 0.999), resampling=plan)
    with lab.threads(1), lab.progress(description, steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            if watch is not None:
                watch(step, model)
            advance(1)

        train.fit(
            model,
            training.loss,
            lambda epoch: data.batches(BATCH, steps, seed=seed),
            replace(settings(steps, beta1, clip), optimizer=training.optimizer),
            on_step=after_step,
        )
        fresh = data.batches(2048, lab.pick(smoke=1, small=10), seed=seed + 1)
        quality = sae.measure(model.eval(), fresh)
    return Trained(model, data, quality, sae.recovery(data.directions, model))
