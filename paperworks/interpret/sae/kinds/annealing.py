"""p-annealing: the penalty sum f^p with p falling from 1 towards a count (Karvonen et al. 2024, arXiv:2408.00113)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Annealing(Spec):
    """p is 1 until `start`, then falls linearly to `end` in `updates` equal steps, spread over the rest of training.

    The last update comes one interval before the end, so that p = end is trained on. At each update the penalty is
    multiplied by (sum of f^p before) / (sum of f^p after) over `queue` batches, which leaves its value there as it was;
    those are the batches from the moment it is due, so p falls that much later.

    start: share of the training steps. end: the last p, in (0, 1). updates: how often p changes. queue: batches.
    """

    start: float = 0.5
    end: float = 0.2
    updates: int = 10
    queue: int = 10

    def validate(self) -> None:
        """Check the ranges."""
        for name, good, wanted in (
            ("start", 0 <= self.start < 1, "a share of the training steps in [0, 1)"),
            ("end", 0 < self.end < 1, "in (0, 1)"),
            ("updates", self.updates >= 1, "1 or more"),
            ("queue", self.queue >= 1, "1 or more batches"),
        ):
            if not good:
                raise ValueError(f"Annealing.{name} must be {wanted}, got {getattr(self, name)}")

    def power(self, updates: int) -> float:
        """p after so many updates."""
        return 1.0 + (self.end - 1.0) * min(updates, self.updates) / self.updates

    def updates_at(self, progress: float) -> int:
        """How many updates are due once `progress`, a share of the steps, is done."""
        if progress < self.start:
            return 0
        # A progress of 0.7 is 0.7000000000000001 or 0.6999999999999999, whichever way it was computed.
        done = int((progress - self.start) / (1 - self.start) * self.updates + 1e-9)
        return min(self.updates, done + 1)


class AnnealedPenalty(nn.Module):
    """rescaling * mean over inputs of sum_i f_i^p; its state (p, rescaling, sums of batches) is in buffers."""

    def __init__(self, annealing: Annealing) -> None:
        super().__init__()
        self.annealing = annealing
        self.updates: Tensor
        self.rescaling: Tensor
        self.sums: Tensor
        self.remembered: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rescaling", torch.ones((), dtype=torch.float64))
        # Of the remembered batches, their sums at the present p and at the next one: all that an update needs to know.
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))

    @property
    def power(self) -> float:
        """The present p."""
        return self.annealing.power(int(self.updates))

    def forward(self, latents: Float[Tensor, "batch latents"], progress: float) -> Float[Tensor, ""]:
        """The penalty of a batch; in training mode, remember the batch where an update is due."""
        present = power_sum(latents, self.power)
        if self.training and int(self.updates) < self.annealing.updates_at(progress):
            self._remember(latents, present)
        return present * (float(self.rescaling) / len(latents))

    @torch.no_grad()
    def _remember(self, latents: Tensor, present: Tensor) -> None:
        following = power_sum(latents, self.annealing.power(int(self.updates) + 1))
        self.sums += torch.stack([present.double(), following.double()])
        self.remembered += 1

    @torch.no_grad()
    def after_step(self) -> None:
        """Lower p where enough batches are remembered, and rescale so that their penalty stays as it was.

        Only called between steps, so that the micro-batches of one step have one p.
        """
        if int(self.remembered) < self.annealing.queue:
            return
        before, after = self.sums.tolist()
        if after > 0:
            self.rescaling *= before / after
        self.updates += 1
        self.sums.zero_()
        self.remembered.zero_()


def power_sum(latents: Float[Tensor, "batch latents"], power: float) -> Float[Tensor, ""]:
    """Sum f^p over inputs and latents; a latent that is off adds nothing and gets no gradient."""
    if power == 1.0:
        return latents.sum()
    on = latents > 0
    return torch.where(on, torch.where(on, latents, 1.0).pow(power), 0.0).sum()
