"""MoRA: high-rank updating with a square matrix (Jiang et al. 2024, arXiv:2405.12130)."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from paperworks.adapt.apply import adapted, require_adapted
from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.merging import fold

Kind = Literal["sharing", "grouped", "grouped-tiled", "tiled-grouped", "decoupling", "rotation", "truncation"]


@dataclass(frozen=True, kw_only=True)
class MoRA(Adapter):
    """h = W0 x + f_decompress(M f_compress(x)), M square with as many numbers as LoRA's two matrices of `rank`.

    M starts at zero; the two operators have no parameters and are linear, so the update merges into the weight. Its
    rank can be that of M, which is far above LoRA's; with "rotation" that of the layer. There is no alpha.

    Attributes:
        rank: of the LoRA that has as many parameters.
        kind: how the layer's features meet M's `side` (the paper's r-hat):
            "sharing" (Eq. 6, for large ranks): feature j is added to slot j mod side; outputs are repeated.
            "grouped": neighbouring features are added up; each output is repeated for its neighbours.
            "grouped-tiled", "tiled-grouped": one for the inputs, the other for the outputs.
            "decoupling" (Eq. 8): the input is cut into pieces, each passes M, and the outputs are joined.
            "rotation" (Eq. 9, for small ranks): the same, the pieces rotated by their place as in RoPE.
            "truncation": the first features alone; the paper's weak baseline.
    """

    rank: int = 8
    kind: Kind = "rotation"

    def validate(self) -> None:
        """Check the rank."""
        if self.rank < 1:
            raise ValueError(f"MoRA.rank must be at least 1, got {self.rank}")

    def side(self, in_features: int, out_features: int) -> int:
        """The side of M for a layer; even for rotations, which work on pairs."""
        side = int(math.sqrt((in_features + out_features) * self.rank) + 0.5)
        return side // 2 * 2 if self.kind == "rotation" else side

    def build(self, layer: LayerInfo) -> Delta:
        """A delta for one layer. Raises `ValueError` if M would be larger than the layer's own weight."""
        in_features, out_features = layer.in_features, layer.out_features
        side = self.side(in_features, out_features)
        if side > min(in_features, out_features):
            raise ValueError(
                f"MoRA.rank {self.rank} needs a {side} x {side} matrix on a {out_features} x {in_features} layer; "
                "choose a smaller rank or other targets"
            )
        return SquareDelta(layer, side, self.kind)


class SquareDelta(Delta):
    """decompress(M compress(x)); from the second phase of ReMoRA on, of features in a random order."""

    phase: Tensor

    def __init__(self, layer: LayerInfo, side: int, kind: Kind) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.square = nn.Parameter(torch.zeros(side, side))
        self.register_buffer("phase", torch.tensor(0))

    def extra_repr(self) -> str:
        """Describe the delta in `print(model)`."""
        return f"{self.kind}, side={len(self.square)}"

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The change of the output, computed in the adapter's own dtype."""
        return self._mapped(x.to(self.square.dtype))

    def _mapped(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        phase = int(self.phase)
        if phase:
            x = x.index_select(-1, _order(self.in_features, phase).to(x.device))
        y = self._through(x)
        return y.index_select(-1, _order(self.out_features, phase).to(x.device)) if phase else y

    def _through(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        side, wanted = len(self.square), self.out_features
        if self.kind == "truncation":
            return F.pad(F.linear(x[..., :side], self.square), (0, wanted - side))
        if self.kind in ("decoupling", "rotation"):
            pieces = _pieces(x, side)
            if self.kind == "rotation":
                pieces = _rotated(pieces)
            return _tiled(F.linear(pieces, self.square).flatten(-2), wanted)
        grouped_in = self.kind in ("grouped", "grouped-tiled")
        y = F.linear(_grouped_sum(x, side) if grouped_in else _pieces(x, side).sum(-2), self.square)
        return y[..., _groups(wanted, side).to(y.device)] if self.kind.endswith("grouped") else _tiled(y, wanted)

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """What the delta, which is linear, makes of the unit vectors."""
        unit = torch.eye(self.in_features, dtype=self.square.dtype, device=self.square.device)
        return self._mapped(unit).t()

    @torch.no_grad()
    def restart(self) -> None:
        """Start the next phase: M is zero again, and other features share its entries."""
        self.square.zero_()
        self.phase.add_(1)


def remora(model: nn.Module, optimizer: Optimizer | None = None, *, lossy: bool = False) -> nn.Module:
    """Take one step of ReMoRA: merge what was learned, and start again with another mapping; in place.

    Args:
        model: a model whose adapters in use are all MoRA.
        optimizer: whose memory of the matrices is dropped.
        lossy: see `merge`.

    Raises:
        ValueError: when another adapter is in use, or as `merge` does; nothing has been changed.
    """
    require_adapted(model)
    used = [(path, layer.deltas[name]) for path, layer in adapted(model).items() for name in layer.in_use]
    for path, delta in used:
        if not isinstance(delta, SquareDelta):
            raise ValueError(f"{path} uses a {type(delta).__name__}; only MoRA can be restarted with another mapping")
    fold(model, lossy=lossy)
    for _, delta in used:
        assert isinstance(delta, SquareDelta)
        delta.restart()
        if optimizer is not None:
            optimizer.state.pop(delta.square, None)
    return model


def _pieces(x: Float[Tensor, "... n"], side: int) -> Float[Tensor, "... pieces side"]:
    """Cut into pieces, the last filled up with the first features."""
    missing = -x.shape[-1] % side
    out: Tensor = (torch.cat((x, x[..., :missing]), -1) if missing else x).unflatten(-1, (-1, side))
    return out


def _tiled(y: Float[Tensor, "... n"], wanted: int) -> Float[Tensor, "... wanted"]:
    """Repeat as often as needed and cut."""
    return torch.cat([y] * -(-wanted // y.shape[-1]), -1)[..., :wanted]


@cache
def _groups(count: int, side: int) -> Int[Tensor, " count"]:
    """The group of each feature: `side` groups of neighbours, the first ones larger by one if need be."""
    small, larger = divmod(count, side)
    sizes = torch.tensor([small + 1] * larger + [small] * (side - larger), device="cpu")
    return torch.arange(side, device="cpu").repeat_interleave(sizes)


def _grouped_sum(x: Float[Tensor, "... n"], side: int) -> Float[Tensor, "... side"]:
    return x.new_zeros(*x.shape[:-1], side).index_add(-1, _groups(x.shape[-1], side).to(x.device), x)


def _rotated(pieces: Float[Tensor, "... pieces side"]) -> Float[Tensor, "... pieces side"]:
    """Rotate piece j by j times the angles of RoPE, the two halves of a piece being the coordinates of its pairs."""
    cos, sin = _turns(pieces.shape[-2], pieces.shape[-1], pieces.dtype, pieces.device)
    first, second = pieces.chunk(2, -1)
    return pieces * cos + torch.cat((-second, first), -1) * sin


@cache
def _turns(pieces: int, side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, side, 2, dtype=torch.float64, device="cpu") / side)
    angle = torch.outer(torch.arange(pieces, dtype=torch.float64, device="cpu"), frequency.repeat(2))
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


@cache
def _order(count: int, phase: int) -> Int[Tensor, " count"]:
    draws = torch.Generator().manual_seed(phase)
    return torch.randperm(count, generator=draws, device="cpu")
