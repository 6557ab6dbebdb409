"""The polytope lens: a network of rectifiers is an affine map on each polytope of its input space (Black et al. 2022,
"Interpreting Neural Networks through the Polytope Lens", arXiv:2211.12312).

A spline code is which units are on, over all rectifiers. Inputs with one code share a polytope, and there
f(x) = W x + b exactly. Works on any module whose nonlinearities are ReLU or LeakyReLU modules, in the order in which
they run; a rectifier called as a function is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_RECTIFIERS = (nn.ReLU, nn.LeakyReLU)
# Not affine between rectifiers, each for its own reason.
_REFUSED = (
    *(nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.ELU, nn.SELU, nn.Softplus, nn.Mish, nn.PReLU, nn.ReLU6),
    *(nn.Hardtanh, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d, nn.MultiheadAttention),
)
_EVALUATED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout)


def rectifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The rectifiers, by path.

    Raises:
        ValueError: when there is none, when another part is not piecewise linear or keeps its switches elsewhere
            (GELU, LayerNorm, max-pooling ...), or when a batch norm or dropout is in training mode.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, _REFUSED):
            raise ValueError(
                f"{path} is a {type(module).__name__}: polytopes are those of networks that are affine but for ReLU "
                "and LeakyReLU modules"
            )
        if isinstance(module, _EVALUATED) and module.training:
            raise ValueError(f"{path} ({type(module).__name__}) is in training mode; call model.eval() first")
        if isinstance(module, _RECTIFIERS):
            found[path] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no ReLU or LeakyReLU module; a rectifier must be a module")
    return found


@contextmanager
def _before_rectifiers(model: nn.Module, see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call see(path, pre-activation) as each rectifier runs; what it returns, if anything, replaces the output."""
    with ExitStack() as stack:
        for path, module in rectifiers(model).items():

            def hook(_: nn.Module, inputs: Any, output: Tensor, path: str = path) -> Tensor | None:
                return see(path, inputs[0])

            if getattr(module, "inplace", False):
                raise ValueError(f"{path} overwrites its input; build it with inplace=False to read pre-activations")
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def pre_activations(model: nn.Module, x: Float[Tensor, "batch ..."]) -> dict[str, Float[Tensor, "batch units"]]:
    """What each rectifier receives, flattened, in the order in which they run."""
    seen: dict[str, Tensor] = {}

    def see(path: str, value: Tensor) -> None:
        if path in seen:
            raise ValueError(f"{path} runs more than once in a pass; give each layer a rectifier of its own")
        seen[path] = value.flatten(1)

    with _before_rectifiers(model, see):
        model(x)
    return seen


def spline_code(model: nn.Module, x: Float[Tensor, "batch ..."]) -> Bool[Tensor, "batch units"]:
    """Which units are on, over all rectifiers: the name of the polytope each input is in."""
    return torch.cat([value > 0 for value in pre_activations(model, x).values()], dim=1)


def hamming(a: Bool[Tensor, "rows units"], b: Bool[Tensor, "others units"]) -> Int[Tensor, "rows others"]:
    """In how many units two codes differ, for every pair."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"codes must be (rows, units) of one network, got {tuple(a.shape)} and {tuple(b.shape)}")
    left, right = a.float(), b.float()
    # units on in one but not in the other; counts are whole numbers far below 2^24, exact in float32
    return (left.sum(1)[:, None] + right.sum(1) - 2 * left @ right.mT).long()


@dataclass(frozen=True)
class AffineMap:
    """f(x) = W x + b on one polytope, with inputs and outputs flattened."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"]

    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        """Apply the map, to inputs within its polytope or beyond."""
        return x.flatten(1) @ self.weight.mT + self.bias


@torch.no_grad()
def affine_map(model: nn.Module, x: Float[Tensor, "..."], chunk: int = 1024) -> AffineMap:
    """The map that the network is on the polytope of `x` (one input, without a batch dimension).

    Found by products of the layers with every rectifier replaced by its slopes at x: b is the output of 0, column i of
    W what unit input i adds to it.

    Raises:
        ValueError: also when the map misses f(x), so that there is a nonlinearity that is no module.
    """
    slopes: dict[str, Tensor] = {}
    modules = rectifiers(model)

    def note(path: str, value: Tensor) -> None:
        low = getattr(modules[path], "negative_slope", 0.0)
        slopes[path] = torch.where(value > 0, torch.ones_like(value), torch.full_like(value, low))

    with _before_rectifiers(model, note):
        expected = model(x[None]).flatten(1)
    inputs = torch.cat([torch.zeros(1, x.numel()).to(x), torch.eye(x.numel()).to(x)])
    with _before_rectifiers(model, lambda path, value: slopes[path] * value):
        outputs = torch.cat([model(part.view(-1, *x.shape)).flatten(1) for part in inputs.split(chunk)])
    found = AffineMap((outputs[1:] - outputs[0]).mT.contiguous(), outputs[0])
    error = (found(x[None]) - expected).abs().max()
    # rounding grows with the terms that are added up; anything else is orders of magnitude larger
    terms = (found.weight.abs() @ x.flatten().abs() + found.bias.abs()).max()
    if bool(error > 1e4 * torch.finfo(x.dtype).eps * terms.clamp_min(1e-6)):
        raise ValueError(
            f"the map misses the network's own output by {error:.3g}: {type(model).__name__} has a nonlinearity that "
            "is not a ReLU or LeakyReLU module"
        )
    return found


@torch.no_grad()
def crossings(model: nn.Module, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, " crossings"]:
    """Where on the segment from a to b (0 to 1) units switch, ascending, one entry for each switch. Exact.

    Between the switches of earlier rectifiers, what a rectifier receives is a straight line in the position, so its
    zeros follow from the values at those switches: one pass for each rectifier, and none is missed as by sampling.
    Use float64 where switches may lie close together.
    """
    if a.shape != b.shape:
        raise ValueError(f"both ends of a segment must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    places = torch.tensor([0.0, 1.0], dtype=a.dtype, device=a.device)
    path_count = len(rectifiers(model))
    for layer in range(path_count):
        column = places.view(-1, *[1] * a.ndim)
        values = list(pre_activations(model, a + column * (b - a)).values())[layer]
        left, right = values[:-1], values[1:]
        piece, unit = ((left > 0) != (right > 0)).nonzero(as_tuple=True)
        from_left = left[piece, unit] / (left[piece, unit] - right[piece, unit])
        switched = places[piece] + from_left * (places[piece + 1] - places[piece])
        places = torch.cat([places, switched]).sort().values
    return places[1:-1]


def crossing_density(model: nn.Module, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """The number of switches between a and b for each unit of distance."""
    distance = float((b - a).norm())
    if not distance > 0:
        raise ValueError("the ends of the segment are the same point, so there is no distance to count along")
    return len(crossings(model, a, b)) / distance
