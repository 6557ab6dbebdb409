"""Feed-forward parts: the MLP (Vaswani et al. 2017) and its gated variants (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.initialization import Part
from paperworks.core.linear import residual_output
from paperworks.nn.tap import Tap

Activation = Literal["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu", "sigmoid", "identity", "relu_squared"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # the exact form, x * Phi(x)
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's approximation
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016; "quick_gelu" elsewhere
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "relu_squared": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
}


@dataclass(frozen=True, kw_only=True)
class Feedforward(Part):
    """What works on each position: `build(dim)` gives a module (batch, time, dim) -> (batch, time, dim)."""

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@dataclass(frozen=True, kw_only=True)
class MLP(Feedforward):
    """y = down(activation(up(x))), with `hidden` units in between."""

    hidden: int
    activation: Activation = "gelu"
    bias: bool = True

    def validate(self) -> None:
        """Check the width."""
        _check_hidden(self.hidden, "MLP")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return MLPModule(dim, self)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Feedforward):
    """y = down(activation(gate(x)) * up(x)): SwiGLU with "silu", GeGLU with "gelu", ReGLU with "relu".

    GLU has "sigmoid", the bilinear layer "identity" (Shazeer 2020, arXiv:2002.05202).
    """

    hidden: int
    activation: Activation = "silu"
    bias: bool = False

    def validate(self) -> None:
        """Check the width."""
        _check_hidden(self.hidden, "GatedMLP")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return GatedMLPModule(dim, self)


def gated_hidden(hidden: int, multiple: int = 1) -> int:
    """The hidden units with which a gated MLP has the parameters of an MLP of `hidden` units: 2/3 of them.

    A gated MLP has three matrices where the MLP has two (Shazeer 2020, Section 2). The nearest multiple of `multiple`,
    at least one. Raises ValueError unless both are at least 1.
    """
    _check_hidden(hidden, "gated_hidden")
    if multiple < 1:
        raise ValueError(f"gated_hidden.multiple must be at least 1, got {multiple}")
    return max(1, round(2 * hidden / 3 / multiple)) * multiple


def _check_hidden(hidden: int, owner: str) -> None:
    if hidden < 1:
        raise ValueError(f"{owner}.hidden must be at least 1, got {hidden}")


class MLPModule(nn.Module):
    """The module of `MLP`; `hidden` taps the activations (batch, time, hidden)."""

    def __init__(self, dim: int, spec: MLP) -> None:
        super().__init__()
        self.up = nn.Linear(dim, spec.hidden, bias=spec.bias)
        self.hidden = Tap()
        self.down = residual_output(nn.Linear(spec.hidden, dim, bias=spec.bias))
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Apply the MLP to each position."""
        out: Tensor = self.down(self.hidden(self.activation(self.up(x))))
        return out


class GatedMLPModule(nn.Module):
    """The module of `GatedMLP`; `hidden` taps the gated activations (batch, time, hidden)."""

    def __init__(self, dim: int, spec: GatedMLP) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, spec.hidden, bias=spec.bias)
        self.up = nn.Linear(dim, spec.hidden, bias=spec.bias)
        self.hidden = Tap()
        self.down = residual_output(nn.Linear(spec.hidden, dim, bias=spec.bias))
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Apply the gated MLP to each position."""
        out: Tensor = self.down(self.hidden(self.activation(self.gate(x)) * self.up(x)))
        return out
