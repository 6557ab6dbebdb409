"""How the papers train CCS: the authors' recipe, on the one loop."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import train
from paperworks.interpret.probing import ccs
from paperworks.lab import Lab

EPOCHS = 1000  # the authors' code: AdamW at 1e-3, decay 0.01, every pair in every step, the best of 10 starts
STARTS = 10


def fit_ccs(
    lab: Lab,
    positive: Float[Tensor, "n dim"],
    negative: Float[Tensor, "n dim"],
    seed: int,
    scaling: ccs.Scaling = "std",
    epochs: int | None = None,
    starts: int = STARTS,
) -> ccs.ContrastProbe:
    """Train probes on pairs as recorded and return the one with the least loss; its sign is free."""
    normalization = ccs.Normalization.of(positive, negative, scaling)
    pairs = tuple(side.float() for side in normalization(positive, negative))
    torch.manual_seed(seed)
    probes = ccs.ConsistencyProbes(positive.shape[1], lab.pick(smoke=2, small=starts))
    settings = train.Settings(
        steps=lab.pick(smoke=5, small=epochs or EPOCHS),
        lr=1e-3,
        optimizer=train.AdamW(weight_decay=0.01),
        schedule="constant",
        warmup=0,
        clip=None,  # a common norm would tie the starts together
        seed=None,
        save_every=None,
        log_every=EPOCHS,
        progress=False,
    )
    train.fit(probes, ccs.ccs_loss, [pairs], settings)
    return ccs.best_of(probes, normalization, positive, negative)
