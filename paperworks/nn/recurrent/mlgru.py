"""MLGRU: a gated recurrence whose gates do not see the state (Zhu et al. 2024, arXiv:2406.02528)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.linear import residual_output
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import StateCache, linear_recurrence, state_of
from paperworks.nn.tap import Tap


@dataclass(frozen=True, kw_only=True)
class MLGRU(Mixer):
    """h_t = f_t h_{t-1} + (1 - f_t) c_t with f = sigmoid(W_f x) and c = silu(W_c x): an elementwise scan.

    Attributes:
        gate: "paper", W_o (sigmoid(W_g x) * h), or "reference", W_o (rms_norm(W_g x) * silu(h)).
        lower_bound: what a forget gate is at least, f = bound + (1 - bound) sigmoid(.); or "learned", for every channel
            and together with the other layers of a stack (see `layer_bounds`).
    """

    gate: Literal["paper", "reference"] = "paper"
    lower_bound: float | Literal["learned"] = 0.0

    def validate(self) -> None:
        """Check the bound."""
        if self.lower_bound != "learned" and not 0 <= self.lower_bound < 1:
            raise ValueError(f"MLGRU.lower_bound must be in [0, 1), got {self.lower_bound}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return MLGRUModule(dim, self)


def layer_bounds(weights: Float[Tensor, "layers dim"]) -> Float[Tensor, "layers dim"]:
    """HGRN's lower bounds of the forget gates: 0 in the first layer, rising with depth, below 1.

    cumsum(softmax(Gamma over layers)) minus its first row (Qin et al. 2023, arXiv:2311.04823).
    """
    shares = weights.softmax(0)
    # sums of what comes after the first: a difference of sums would lose the smallest of them
    return torch.cat((torch.zeros_like(shares[:1]), shares[1:].cumsum(0)))


def forget_bounds(depth: int) -> list[float]:
    """`layer_bounds` for equal weights, as numbers: l / depth in layer l."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return [layer / depth for layer in range(depth)]


class MLGRUModule(nn.Module):
    """The module of `MLGRU`. Tap: `state` (batch, time, dim).

    Attributes:
        bound: this layer's row of Gamma, where bounds are learned.
        peers: the layers that learn their bounds together, this one at `place`; by itself, a layer is the first.
    """

    def __init__(self, dim: int, spec: MLGRU) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim
        self.forget = nn.Linear(dim, dim, bias=False)
        self.candidate = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.bound = nn.Parameter(torch.zeros(dim)) if spec.lower_bound == "learned" else None
        self.place: int = 0
        self.peers: tuple[MLGRUModule, ...] = (self,)
        self.state = Tap()
        self.norm = nn.RMSNorm(dim, eps=1e-6) if spec.gate == "reference" else None
        self.output = residual_output(nn.Linear(dim, dim, bias=False))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The state before the first token: zeros, whatever `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return StateCache(state=torch.zeros(batch, self.dim, dtype=wide, device=device))

    @staticmethod
    def share_layers(layers: list[MLGRUModule]) -> None:
        """Tell the layers whose bounds are learned of each other, in order: a bound depends on all of them."""
        learned = [layer for layer in layers if layer.bound is not None]
        for place, layer in enumerate(learned):
            layer.place, layer.peers = place, tuple(learned)

    def lower_bound(self) -> float | Float[Tensor, " dim"]:
        """What a forget gate is at least: one number, or one a channel."""
        if self.spec.lower_bound != "learned":
            return self.spec.lower_bound
        rows: list[Tensor] = [layer.bound for layer in self.peers if layer.bound is not None]
        wide = torch.stack(rows).to(torch.float64 if rows[0].dtype == torch.float64 else torch.float32)
        return layer_bounds(wide)[self.place]

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        bound = self.lower_bound()
        forget = bound + (1 - bound) * torch.sigmoid(self.forget(x).to(wide))
        drive = (1 - forget) * F.silu(self.candidate(x).to(wide))
        keeps = forget if begins is None else forget.masked_fill(begins[..., None], 0.0)
        states = linear_recurrence(keeps, drive, None if cache is None else cache["state"])
        if cache is not None:
            cache["state"] = states[:, -1]
        shown, gate = self.state(states).to(x.dtype), self.gate(x)
        mixed = torch.sigmoid(gate) * shown if self.norm is None else self.norm(gate) * F.silu(shown)
        out: Tensor = self.output(mixed)
        return out
