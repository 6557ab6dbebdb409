"""Superposition: a toy model that packs sparse features into few dimensions, and how to see that it does.

Elhage et al. 2022, "Toy Models of Superposition", transformer-circuits.pub/2022/toy_model, arXiv:2209.10652.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.errors import unknown

Rectifier = Literal["output", "hidden", "none"]
Pairing = Literal["correlated", "anticorrelated"]


class ToyModel(nn.Module):
    """x' = ReLU(W^T W x + b): many independent copies, trained side by side along the leading axis.

    `rectifier` says where the ReLU stands: on the output (the paper's model), on the hidden units before W^T, or
    nowhere (the paper's linear model). W starts Xavier-normal, b at zero; the weight is tied.
    """

    def __init__(self, instances: int, features: int, hidden: int, rectifier: Rectifier = "output") -> None:
        super().__init__()
        if rectifier not in get_args(Rectifier):
            raise ValueError(unknown("place of the ReLU", rectifier, get_args(Rectifier)))
        if min(instances, features, hidden) < 1:
            raise ValueError(f"instances, features and hidden must be positive, not {instances}, {features}, {hidden}")
        self.rectifier = rectifier
        spread = (2 / (features + hidden)) ** 0.5  # Xavier-normal, for one instance's (hidden, features) matrix
        self.weight = nn.Parameter(spread * torch.randn(instances, hidden, features))
        self.bias = nn.Parameter(torch.zeros(instances, 1, features))

    def forward(self, x: Float[Tensor, "instances batch features"]) -> Float[Tensor, "instances batch features"]:
        """The reconstruction of every instance's batch."""
        hidden = x @ self.weight.mT
        if self.rectifier == "hidden":
            hidden = hidden.relu()
        output = torch.baddbmm(self.bias, hidden, self.weight)
        return output.relu() if self.rectifier == "output" else output


class AbsoluteValueModel(nn.Module):
    """y = ReLU(W2 ReLU(W1 x) + b), untied: computes |x| of many features in fewer hidden units."""

    def __init__(self, instances: int, features: int, hidden: int) -> None:
        super().__init__()
        spread = (2 / (features + hidden)) ** 0.5
        self.read = nn.Parameter(spread * torch.randn(instances, hidden, features))
        self.write = nn.Parameter(spread * torch.randn(instances, features, hidden))
        self.bias = nn.Parameter(torch.zeros(instances, 1, features))

    def forward(self, x: Float[Tensor, "instances batch features"]) -> Float[Tensor, "instances batch features"]:
        """The estimate of |x|."""
        hidden = (x @ self.read.mT).relu()
        return torch.baddbmm(self.bias, hidden, self.write.mT).relu()


def sparse_features(
    batch: int, density: Float[Tensor, " instances"], features: int, generator: torch.Generator | None = None
) -> Float[Tensor, "instances batch features"]:
    """Draw features that are U[0, 1] with probability `density` (the paper's 1 - S) and 0 otherwise."""
    if bool(((density <= 0) | (density > 1)).any()):
        raise ValueError(f"density is the chance of being active, in (0, 1]; got {density.tolist()}")
    # One draw does both jobs: u below the density is active, and u / density is then itself uniform on [0, 1].
    share = density.view(-1, 1, 1)
    draw = torch.rand(len(density), batch, features, generator=generator, device=density.device)
    return torch.where(draw < share, draw / share, 0.0)


def paired_features(
    batch: int,
    density: Float[Tensor, " instances"],
    features: int,
    pairing: Pairing,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "instances batch features"]:
    """Draw features in pairs (2k, 2k + 1): both active together, or exactly one of the two whenever the pair is active.

    `density` is the chance that a pair is active; every active feature is U[0, 1].
    """
    if pairing not in get_args(Pairing):
        raise ValueError(unknown("pairing", pairing, get_args(Pairing)))
    if features % 2:
        raise ValueError(f"features come in pairs, so their number must be even, not {features}")
    shape = (len(density), batch, features // 2, 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=density.device)

    active = uniform(*shape) < density.view(-1, 1, 1, 1)
    if pairing == "anticorrelated":
        first = uniform(*shape) < 0.5
        active = active & torch.cat([first, ~first], dim=-1)
    value = uniform(*shape[:-1], 2)
    return torch.where(active, value, 0.0).flatten(2)


def weighted_error(
    output: Float[Tensor, "instances batch features"],
    target: Float[Tensor, "instances batch features"],
    importance: Float[Tensor, "*instances features"],
) -> Float[Tensor, " instances"]:
    """Each instance's loss: the mean over the batch of sum_i I_i (x_i - x'_i)^2."""
    return ((output - target).square().mean(dim=1) * importance).sum(dim=-1)


def linear_optimum(importance: Float[Tensor, " features"], hidden: int) -> float:
    """The least loss of the linear model on dense features: it keeps the `hidden` most important ones.

    What is dropped is predicted by its mean, so each dropped feature costs I_i times the variance 1/12 of U[0, 1].
    """
    return float(importance.sort(descending=True).values[hidden:].sum() / 12)


def feature_norms(weight: Float[Tensor, "*instances hidden features"]) -> Float[Tensor, "*instances features"]:
    """||W_i||: near 1 where feature i is represented, near 0 where it is not."""
    return weight.norm(dim=-2)


def _overlaps(weight: Float[Tensor, "*instances hidden features"]) -> Float[Tensor, "*instances features features"]:
    """(unit W_i . W_j)^2 in row i, column j; a feature without a direction overlaps with nothing."""
    norms = weight.norm(dim=-2, keepdim=True)
    unit = weight / norms.clamp_min(torch.finfo(weight.dtype).tiny)
    return (unit.mT @ weight).square()


def superposition(weight: Float[Tensor, "*instances hidden features"]) -> Float[Tensor, "*instances features"]:
    """Sum over j != i of (unit W_i . W_j)^2: how much other features are seen along feature i's direction."""
    overlaps = _overlaps(weight)
    return overlaps.sum(dim=-1) - overlaps.diagonal(dim1=-2, dim2=-1)


def dimensionality(weight: Float[Tensor, "*instances hidden features"]) -> Float[Tensor, "*instances features"]:
    """D_i = ||W_i||^2 / sum_j (unit W_i . W_j)^2: the share of a dimension that feature i has to itself.

    1 is a dimension of its own, 1/2 an antipodal pair, 2/5 a pentagon's corner; 0 for a feature not represented.
    """
    overlaps = _overlaps(weight)
    own = overlaps.diagonal(dim1=-2, dim2=-1)
    return own / overlaps.sum(dim=-1).clamp_min(torch.finfo(weight.dtype).tiny)


def dimensions_per_feature(weight: Float[Tensor, "*instances hidden features"]) -> Float[Tensor, "*instances"]:
    """D* = m / ||W||_F^2: dimensions available for each feature the model represents."""
    return weight.shape[-2] / weight.square().sum(dim=(-2, -1))


def neighbour_angles(weight: Float[Tensor, "2 features"]) -> Float[Tensor, " features"]:
    """The angles in degrees between neighbouring features around the plane; they add up to 360."""
    if weight.ndim != 2 or weight.shape[0] != 2:
        raise ValueError(f"angles around a plane need a weight of shape (2, features), not {tuple(weight.shape)}")
    around = torch.atan2(weight[1], weight[0]).rad2deg().sort().values
    return torch.cat([around[1:], around[:1] + 360]) - around


def regular_polygon(corners: int) -> Float[Tensor, "2 corners"]:
    """Unit features at the corners of a regular polygon, which is how equal features share a plane."""
    turn = torch.arange(corners, dtype=torch.float64) * (2 * torch.pi / corners)
    return torch.stack([turn.cos(), turn.sin()])
