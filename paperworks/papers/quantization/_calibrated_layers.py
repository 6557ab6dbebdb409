"""Linear layers of SmolLM2 with the second moments of their inputs, and the baselines rounding methods are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress import WeightFormat
from paperworks.compress.calibration.calibration import Calibration, stages
from paperworks.compress.calibration.ldlq import feedback_factor, ldlq, proxy_loss
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.grids import find_grid
from paperworks.compress.formats.incoherence import damped
from paperworks.core.linear import weight_of
from paperworks.core.selection import select_linears
from paperworks.papers.quantization._rounded_model import Bench

ENERGY = "share of the outputs' energy lost"


@dataclass(frozen=True)
class Layer:
    """A weight and what its inputs look like on text."""

    path: str
    weight: Float[Tensor, "rows columns"]
    statistics: Statistics

    def loss(self, rounded: Float[Tensor, "rows columns"]) -> float:
        """Share of the output's energy that rounding costs: tr(E H E^T) / tr(W H W^T)."""
        moment = self.statistics.required("second_moment").double()
        weight = self.weight.double()
        return float(proxy_loss(rounded.double() - weight, moment) / proxy_loss(weight, moment))

    def loss_in(self, format: WeightFormat) -> float:
        """That share for a format."""
        shape = (self.weight.shape[0], self.weight.shape[1])
        return self.loss(format.decode(format.encode(self.weight, self.statistics), shape))

    def loss_by_row(self, bits: int, feedback: bool) -> float:
        """That share for a grid a row from its least to its largest weight: GPTQ, or plain rounding."""
        moment = damped(self.statistics.required("second_moment").double(), 0.01)
        factor = feedback_factor(moment) if feedback else torch.zeros_like(moment)
        grid = find_grid(self.weight.double(), bits, symmetric=False)
        return self.loss(ldlq(self.weight.double(), factor, lambda x: (grid.nearest(x), grid.codes(x)))[0])


@torch.no_grad()
def calibrated_layers(bed: Bench, seed: int) -> list[Layer]:
    """The layers of a bench that are rounded, with the moments of their inputs in the model as loaded."""
    if ("layers", seed) not in bed.kept:
        layers = select_linears(bed.model, bed.targets)
        calibration = Calibration(bed.calibration(seed), sequential=False)
        weights = {path: weight_of(layer).detach().float() for path, layer in layers.items()}
        bed.kept["layers", seed] = [
            Layer(path, weights[path], stage.statistics)
            for stage in stages(bed.model, list(layers), calibration, ["second_moment", "absolute_mean"])
            for path in stage.paths
        ]
    return bed.kept["layers", seed]


def energy_lost(bed: Bench, rounding: WeightFormat | Callable[[Layer], float]) -> Callable[[int], dict[str, float]]:
    """Arm of a comparison: the share of the outputs' energy that a rounding costs, geometric mean over the layers.

    The rounding is a format, or a function that gives the share for a layer.
    """
    lost = (lambda layer: layer.loss_in(rounding)) if isinstance(rounding, WeightFormat) else rounding

    def run(seed: int) -> dict[str, float]:
        return {ENERGY: geometric_mean([lost(layer) for layer in calibrated_layers(bed, seed)])}

    return run


def geometric_mean(values: list[float]) -> float:
    """exp(mean(log)): ratios of it are mean ratios."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())
