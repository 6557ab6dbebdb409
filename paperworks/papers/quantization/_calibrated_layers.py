"""Linear layers of SmolLM2 with the second moments of their inputs, and the baselines rounding methods are held to."""

from __future__ import annotations

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
from paperworks.lab import Lab
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2


@dataclass(frozen=True)
class Layer:
    """A weight and what its inputs look like on text."""

    path: str
    weight: Float[Tensor, "rows columns"]
    statistics: Statistics

    def loss(self, rounded: Float[Tensor, "rows columns"]) -> float:
        """Return the share of the output's energy that rounding costs: tr(E H E^T) / tr(W H W^T)."""
        moment = self.statistics.required("second_moment").double()
        weight = self.weight.double()
        return float(proxy_loss(rounded.double() - weight, moment) / proxy_loss(weight, moment))

    def loss_in(self, format: WeightFormat) -> float:
        """Return that share for a format."""
        shape = (self.weight.shape[0], self.weight.shape[1])
        return self.loss(format.decode(format.encode(self.weight, self.statistics), shape))

    def loss_by_row(self, bits: int, feedback: bool) -> float:
        """Return that share for a grid a row from its least to its largest weight: GPTQ, or plain rounding."""
        moment = damped(self.statistics.required("second_moment").double(), 0.01)
        factor = feedback_factor(moment) if feedback else torch.zeros_like(moment)
        grid = find_grid(self.weight.double(), bits, symmetric=False)
        return self.loss(ldlq(self.weight.double(), factor, lambda x: (grid.nearest(x), grid.codes(x)))[0])


@torch.no_grad()
def calibrated_layers(lab: Lab, blocks: tuple[int, ...] = (0, 14, 29)) -> tuple[list[Layer], str]:
    """Return layers of some blocks (in a smoke run one of a stand-in), and in words what text their inputs are of."""
    model = smollm2(lab)
    text = scored_text(model.tokenizer, lab.pick(smoke=48, small=2048, large=16_384))
    targets = lab.pick(smoke=["blocks.0.mixer.value"], small=[f"blocks.{n}.*" for n in blocks])
    layers = select_linears(model, targets)
    windows = [window[None] for window in text.tokens.to(lab.device).split(512)]
    seen = stages(model, list(layers), Calibration(windows, sequential=False), ["second_moment"])
    weights = {path: weight_of(layer).detach().float() for path, layer in layers.items()}
    return [Layer(path, weights[path], stage.statistics) for stage in seen for path in stage.paths], text.words


def geometric_mean(values: list[float]) -> float:
    """Return exp(mean(log)): ratios of it are mean ratios."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())
