"""An autoencoder in the place of the activations it reconstructs, and how much of the model's skill comes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.taps import edit

Loss = Callable[[nn.Module, Any], Any]


@contextmanager
def splice(
    model: nn.Module, tap: str, sae: SparseAutoencoder, *, leave_out_first: int = 0, longest: float | None = None
) -> Iterator[nn.Module]:
    """Replace a tap's output by its reconstruction in the forward passes inside the context.

    leave_out_first: positions at the start of each sequence that pass unchanged: those the autoencoder never saw.
    longest: activations longer than this pass unchanged, for the same reason.

    Raises ValueError at the forward pass when the tap's activations do not have the autoencoder's size.
    """
    with edit(model, {tap: _replacing(tap, sae, leave_out_first, longest)}):
        yield model


def _replacing(
    tap: str, reconstruct: Callable[[Tensor], Tensor], first: int, longest: float | None
) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        if isinstance(reconstruct, SparseAutoencoder) and x.shape[-1] != reconstruct.dim:
            raise ValueError(
                f"{tap} gives activations of size {x.shape[-1]}, the autoencoder reads size {reconstruct.dim}: "
                "it was made for another model or tap"
            )
        changed = reconstruct(x).to(x.dtype)
        if longest is not None:
            changed = torch.where(x.norm(dim=-1, keepdim=True) > longest, x, changed)
        return torch.cat([x[:, :first], changed[:, first:]], dim=1) if first else changed

    return change


@dataclass(frozen=True)
class Spliced:
    """The model's loss, a mean: as it is, with the reconstruction, and with zeros in the tap's place."""

    clean: float
    spliced: float
    zero: float

    @property
    def recovered(self) -> float:
        """(zero - spliced) / (zero - clean): 1 where nothing is lost, 0 where zeros would do as well."""
        return (self.zero - self.spliced) / (self.zero - self.clean)


@torch.no_grad()
def loss_recovered(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    batches: Iterable[Any],
    loss: Loss,
    *,
    leave_out_first: int = 0,
    longest: float | None = None,
    baseline: tuple[float, float] | None = None,
) -> Spliced:
    """Measure a model's loss with an autoencoder spliced into it.

    Args:
        model, tap, sae: what is spliced, and where.
        batches: of the model's inputs.
        loss: loss(model, batch) -> a mean, or (sum, count), as for training.
        leave_out_first, longest: see `splice`; zeros leave the same positions out.
        baseline: (clean, zero) as an earlier call measured them on the same batches, to measure them once only.
    """
    inputs = list(batches)
    if not inputs:
        raise ValueError("there are no batches to measure the loss on")
    if baseline is None:
        with edit(model, {tap: _replacing(tap, torch.zeros_like, leave_out_first, longest)}):
            zero = _mean(model, inputs, loss)
        baseline = (_mean(model, inputs, loss), zero)
    with splice(model, tap, sae, leave_out_first=leave_out_first, longest=longest):
        spliced = _mean(model, inputs, loss)
    return Spliced(clean=baseline[0], spliced=spliced, zero=baseline[1])


def _mean(model: nn.Module, inputs: list[Any], loss: Loss) -> float:
    total, count = 0.0, 0.0
    for batch in inputs:
        returned = loss(model, batch)
        value, elements = returned if isinstance(returned, tuple) else (returned, 1.0)
        total, count = total + float(value), count + float(elements)
    return total / count
