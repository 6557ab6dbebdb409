"""What training an autoencoder adds to the one loop: progress for penalties, unit rows, new life for dead latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from paperworks.interpret.sae.autoencoder import Metrics, SparseAutoencoder

NEW_ENCODER = 0.2  # length of a new encoder row, relative to the living ones (Bricken et al. 2023)


@dataclass(frozen=True)
class Resampling:
    """When the dead get new directions, and from what (Bricken et al. 2023, "Neuron Resampling").

    at: steps after which it happens (25,000, 50,000, 75,000 and 100,000 in the paper).
    dead_after: inputs for which a latent must not have been on (those of 12,500 steps).
    sample: gives the inputs among which badly reconstructed ones are found (819,200 of them).
    seed: of the draws.
    """

    at: tuple[int, ...]
    dead_after: int
    sample: Callable[[], Float[Tensor, "inputs dim"]]
    seed: int = 0


class Training:
    """The three things `train.fit` is handed to train a sparse autoencoder:

        training = sae.Training(model, steps=2000)
        train.fit(model, training.loss, activations, settings, on_step=training.after_step)

    and, where latents are resampled, `Settings(optimizer=training.optimizer)`, whose moments must be reset with them.

    Args:
        model: the autoencoder.
        steps: of the whole run, as in the settings; warm-ups and annealing are shares of it.
        betas, eps: of the optimizer that `optimizer` makes.
        resampling: when and how dead latents are given new directions; None leaves them.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        steps: int,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        resampling: Resampling | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; the number of training steps is needed, 1 or more")
        self.model, self.steps, self.betas, self.eps, self.resampling = model, steps, betas, eps, resampling
        self.resampled: dict[int, int] = {}
        self._optimizer: Optimizer | None = None

    def loss(self, model: nn.Module, x: Float[Tensor, "batch dim"]) -> tuple[Float[Tensor, ""], Metrics]:
        """The model's own loss at this point of training, and its metrics."""
        autoencoder: Any = model
        out: tuple[Float[Tensor, ""], Metrics] = autoencoder.loss(x, int(self.model.steps_taken) / self.steps)
        return out

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Make Adam, without weight decay, and remember it for resampling."""
        self._optimizer = torch.optim.Adam(groups, betas=self.betas, eps=self.eps, fused=True)
        return self._optimizer

    def after_step(self, step: int) -> None:
        """Do what follows an optimizer step; for `on_step`."""
        self.model.after_step()
        if self.resampling is not None and step in self.resampling.at:
            if self._optimizer is None:
                raise ValueError(
                    "resampling resets the optimizer's moments: pass Settings(optimizer=training.optimizer) to fit"
                )
            dead = self.model.idle >= self.resampling.dead_after
            generator = torch.Generator().manual_seed(self.resampling.seed + step)
            resample(self.model, self.resampling.sample(), dead, self._optimizer, generator)
            self.resampled[step] = int(dead.sum())


@torch.no_grad()
def resample(
    model: SparseAutoencoder,
    inputs: Float[Tensor, "inputs dim"],
    dead: Bool[Tensor, " latents"],
    optimizer: Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Point dead latents at inputs that are badly reconstructed. In place (Bricken et al. 2023).

    Inputs are drawn with probability proportional to ||x - x'||^4, the square of their loss. A new decoder row is the
    input at unit length; the encoder row has its direction and 0.2 of the mean length of living encoder rows; biases
    become 0. The optimizer's moments of all these entries become 0.

    Raises ValueError when there are fewer inputs than dead latents, or no latent is alive.
    """
    count = int(dead.sum())
    if not count:
        return
    if count == model.latents:
        raise ValueError("every latent is dead: there are no living encoder rows to take the length from; train anew")
    x = model.check(inputs)
    loss = (x - model(x)).square().sum(dim=1).double()
    if int((loss > 0).sum()) < count:
        raise ValueError(f"{count} latents are dead, but only {int((loss > 0).sum())} inputs are left to point them at")
    chosen = torch.multinomial((loss / loss.max()).square().cpu(), count, generator=generator).to(x.device)
    length = NEW_ENCODER * model.encoder[~dead].norm(dim=1).mean()
    directions = nn.functional.normalize(x[chosen], dim=1)
    model.decoder[dead] = directions
    model.encoder[dead] = length * directions
    for name in model.latent_biases():
        model.get_parameter(name)[dead] = 0
    model.idle[dead] = 0
    if optimizer is not None:
        _forget(optimizer, model, dead)


def _forget(optimizer: Optimizer, model: SparseAutoencoder, dead: Tensor) -> None:
    for parameter in (model.encoder, model.decoder, *(model.get_parameter(name) for name in model.latent_biases())):
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[dead] = 0
