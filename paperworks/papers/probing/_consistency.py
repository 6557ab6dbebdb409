"""How the papers train CCS: the authors' recipe, on the one loop."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import train
from paperworks.interpret.probing import ccs
from paperworks.lab import Lab
from paperworks.testbeds.training import fit
from paperworks.train.objective import Loss

EPOCHS = 1000  # the authors' code: AdamW at 1e-3, decay 0.01, every pair in every step, the best of 10 starts
STARTS = 10


def fit_ccs(
    lab: Lab,
    positive: Float[Tensor, "n dim"],
    negative: Float[Tensor, "n dim"],
    seed: int,
    scaling: ccs.Scaling = "std",
    loss: Loss = ccs.ccs_loss,
) -> ccs.ContrastProbe:
    """Train probes on pairs as recorded and choose the one with the least loss; its sign is free."""
    normalization = ccs.Normalization.of(positive, negative, scaling)
    pairs = tuple(side.float() for side in normalization(positive, negative))
    torch.manual_seed(seed)
    probes = ccs.ConsistencyProbes(positive.shape[1], lab.pick(smoke=2, small=STARTS))
    steps = lab.pick(smoke=5, small=EPOCHS)
    adam = train.AdamW(weight_decay=0.01)
    constant: dict[str, Any] = {"schedule": "constant", "warmup": 0}
    # A common norm for clipping would tie the starts together.
    fit(probes, loss, [pairs], steps=steps, lr=1e-3, seed=seed, optimizer=adam, clip=None, **constant)
    return ccs.best_of(probes, normalization, positive, negative)
