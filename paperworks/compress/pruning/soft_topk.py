"""Hidden units pruned by learned soft top-k masks (Lei et al. 2023, arXiv:2304.04947; AFM, arXiv:2407.21075).

Masks are put on, learned while their temperature falls, and the model is cut down to the units that are left:

    masks = mask_hidden_units(model, keep=0.5)
    train.fit(model, ..., on_step=lambda step: set_temperature(masks, annealed(step, steps)))
    smaller = models.pruning.keep_hidden_units(model, kept_units(masks))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.selection import replace_module
from paperworks.nn.feedforward.mlp import GatedMLPModule, MLPModule

_HALVINGS = 60  # of the interval that holds the threshold: more than float64 tells apart


def soft_top_k(scores: Float[Tensor, " units"], k: int, temperature: float) -> Float[Tensor, " units"]:
    """m = sigmoid((scores - t) / temperature), t such that the m sum to k; at temperature 0 the k highest are 1.

    This is the mask of sum k that maximizes scores . m + temperature * entropy(m); its gradient,
    dm_i / ds_j = m'_i (1(i = j) - m'_j / sum m') with m' = m (1 - m) / temperature, passes through t.
    Raises ValueError unless 1 <= k <= the number of units and the temperature is at least 0.
    """
    count = len(scores)
    if not 1 <= k <= count:
        raise ValueError(f"k must be from 1 to the {count} units, got {k}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if k == count:
        return torch.ones_like(scores)
    if temperature == 0:
        return torch.zeros_like(scores).index_fill(0, scores.topk(k).indices, 1.0)
    wide = scores.double() / temperature
    with torch.no_grad():
        # at these ends the sigmoids are all above k / count, or all below
        margin = float(torch.logit(torch.tensor(k / count, dtype=torch.float64)))
        low, high = wide.min() - margin, wide.max() - margin
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            more = torch.sigmoid(wide - middle).sum() > k
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        threshold = (low + high) / 2
        mask = torch.sigmoid(wide - threshold)
        slope = (mask * (1 - mask)).sum().clamp(min=1e-30)
    # one step of Newton's method from the solution: its value is the threshold, its derivative the implicit one
    threshold = threshold + (torch.sigmoid(wide - threshold).sum() - k) / slope
    return torch.sigmoid(wide - threshold).to(scores.dtype)


def annealed(step: int, steps: int, start: float = 1.0, end: float = 0.01) -> float:
    """The temperature at `step` of `steps`: from start to end by equal factors, 0 from the last step on."""
    return 0.0 if step >= steps else start * (end / start) ** (step / steps)


class SoftTopKMask(nn.Module):
    """Multiplies hidden units by their soft top-k mask. Attributes: `scores`, learned; `k`; `temperature`."""

    def __init__(self, units: int, k: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        self.scores = nn.Parameter(torch.zeros(units))

    def extra_repr(self) -> str:
        """Describe the mask in `print(model)`."""
        return f"{self.k} of {len(self.scores)}, temperature={self.temperature}"

    def mask(self) -> Float[Tensor, " units"]:
        """What the units are multiplied by."""
        return soft_top_k(self.scores, self.k, self.temperature)

    def kept(self) -> Int[Tensor, " kept"]:
        """The indices of the k highest scores, ascending."""
        return self.scores.detach().topk(self.k).indices.sort().values

    def forward(self, hidden: Float[Tensor, "batch time units"]) -> Float[Tensor, "batch time units"]:
        """Multiply each unit by its mask."""
        return hidden * self.mask().to(hidden.dtype)


def mask_hidden_units(model: nn.Module, keep: float = 0.5, temperature: float = 1.0) -> dict[str, SoftTopKMask]:
    """Put a mask on the hidden units of every MLP and gated MLP under `model`, in place; return them by path.

    Args:
        keep: the share of units that stay, in (0, 1]; at least one of each layer does.
        temperature: at first; see `annealed`.

    Raises ValueError for a share outside that, and where there is nothing to mask or masks already.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    masks: dict[str, SoftTopKMask] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, MLPModule | GatedMLPModule):
            if isinstance(module.hidden, SoftTopKMask):
                raise ValueError(f"{path} is masked already: cut it down first (models.pruning.keep_hidden_units)")
            units = int(module.down.in_features)
            mask = SoftTopKMask(units, max(1, round(keep * units)), temperature)
            masks[f"{path}.hidden" if path else "hidden"] = mask.to(next(module.parameters()).device)
    if not masks:
        raise ValueError(f"{type(model).__name__} holds no MLP or gated MLP whose hidden units could be masked")
    for path, mask in masks.items():
        replace_module(model, path, mask)
    return masks


def set_temperature(masks: Mapping[str, SoftTopKMask] | Iterable[SoftTopKMask], temperature: float) -> None:
    """Give all masks this temperature; 0 makes them zeros and ones."""
    for mask in masks.values() if isinstance(masks, Mapping) else masks:
        mask.temperature = temperature


def kept_units(masks: Mapping[str, SoftTopKMask]) -> dict[str, Int[Tensor, " kept"]]:
    """The units that each mask keeps, by path: what `models.pruning.keep_hidden_units` cuts a model down to."""
    return {path: mask.kept() for path, mask in masks.items()}
