"""End-to-end training: an autoencoder keeps what the model needs, not what varies most (Braun et al. 2024).

arXiv:2405.12241, "Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import Metrics, SparseAutoencoder, warmed
from paperworks.interpret.taps import edit, record


class EndToEnd:
    """A loss that runs the model with the autoencoder's output in the place of its activations.

    loss = kl * KL(p_clean || p_spliced) + reconstruction * mean (a - a')^2 + sparsity / dim * mean sum_i f_i ||d_i||
        + downstream / K * sum over K later taps of mean (a_clean - a_spliced)^2,

    KL a mean over all positions, errors means over dimensions. kl alone is the paper's "e2e", with `downstream` its
    "e2e+ds", `reconstruction` alone its "local". Gradients go through the model, which is frozen and changes no more.

        loss = sae.EndToEnd(model, "blocks.6", sparsity=1.5, steps=1000)
        train.fit(autoencoder, loss, batches, settings, on_step=sae.Training(autoencoder, steps=1000).after_step)

    Weighing f_i by ||d_i|| is the same as normalizing decoder rows in the forward pass, as the authors do; give a
    `Standard(decoder="weighted")`, whose encoder reads the activations themselves.

    Args:
        model: any module whose output is logits, or has them as `.logits`; its parameters stop requiring gradients.
        tap: where the autoencoder stands.
        sparsity, kl, reconstruction, downstream: weights of the terms.
        later: taps whose activations are kept close, where `downstream` is not 0.
        steps: of the whole run; warmup: share of them over which the sparsity weight rises from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: str,
        *,
        steps: int,
        sparsity: float,
        kl: float = 1.0,
        reconstruction: float = 0.0,
        downstream: float = 0.0,
        later: Sequence[str] = (),
        warmup: float = 0.1,
    ) -> None:
        weights = {"sparsity": sparsity, "kl": kl, "reconstruction": reconstruction, "downstream": downstream}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}; a weight of 0 or more is needed")
        if not kl and not reconstruction and not downstream:
            raise ValueError("kl, reconstruction and downstream are all 0: nothing says what is to be kept")
        if bool(downstream) != bool(later):
            raise ValueError("downstream is a weight for the taps in `later`: give both or neither")
        if steps < 1:
            raise ValueError(f"steps is {steps}; the number of training steps is needed, 1 or more")
        self.model, self.tap, self.later, self.steps, self.warmup = model, tap, list(later), steps, warmup
        self.sparsity, self.kl, self.reconstruction, self.downstream = sparsity, kl, reconstruction, downstream
        model.requires_grad_(False)

    def __call__(self, autoencoder: nn.Module, batch: Any) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of a batch of the model's inputs; see the class."""
        assert isinstance(autoencoder, SparseAutoencoder)
        with torch.no_grad(), record(self.model, [self.tap, *self.later]) as clean:
            target = _log_probabilities(self.model(batch))
        x = autoencoder.check(clean[self.tap])
        latents = autoencoder.encode(x)
        replaced = autoencoder.decode(latents)
        progress = int(autoencoder.steps_taken) / self.steps
        strength = autoencoder.strength(latents).sum(dim=-1).mean() / autoencoder.dim
        loss = warmed(self.sparsity, self.warmup, progress) * strength
        metrics: dict[str, Any] = {"l0": (latents > 0).sum(dim=-1).float().mean(), "sparsity": strength.detach()}
        if self.reconstruction:
            error = (x - replaced).square().mean()
            loss = loss + self.reconstruction * error
            metrics["error"] = error.detach()
        if self.kl or self.downstream:
            divergence, apart = self._run_on(batch, replaced.to(clean[self.tap].dtype), target, clean)
            loss = loss + self.kl * divergence + self.downstream * apart
            metrics |= {"kl": divergence.detach(), "downstream": apart.detach()}
        autoencoder.see(latents.detach().flatten(0, -2))
        return loss, metrics

    def _run_on(self, batch: Any, replaced: Tensor, target: Tensor, clean: Any) -> tuple[Tensor, Tensor]:
        """Run the model with the replacement; return KL(clean || spliced) and the mean distance downstream."""
        # With the tap itself among the recorded there is always something to record; hooks see what the edit made.
        with (
            edit(self.model, {self.tap: lambda _: replaced}),
            record(self.model, [self.tap, *self.later], detach=False) as seen,
        ):
            spliced = _log_probabilities(self.model(batch))
        divergence = (target.exp() * (target - spliced)).sum(dim=-1).mean()
        distances = [(seen[path] - clean[path]).square().mean() for path in self.later]
        apart = torch.stack(distances).mean() if distances else divergence.new_zeros(())
        return divergence, apart


def _log_probabilities(output: Any) -> Float[Tensor, "*positions vocab"]:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned {type(output).__name__}; logits, or an object with .logits, are needed")
    return logits.float().log_softmax(dim=-1) if logits.dtype.itemsize < 4 else logits.log_softmax(dim=-1)
