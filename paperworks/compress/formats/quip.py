"""QuIP (Chee, Cai, Kuleshov & De Sa 2023, arXiv:2307.13304): few bits by incoherence processing and LDLQ."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.ldlq import descend, feedback_factor, ldlq
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.incoherence import balancing_scales, damped, kronecker_rotation
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes

GREEDY_PASSES = 10  # of LDLQ-RG; the paper takes 10 for small models and 5 for large ones

_SMALLEST_SCALE = 1e-30  # a matrix of zeros has no scale; any divisor leaves its codes in the middle of the grid


@dataclass(frozen=True, kw_only=True)
class QuIP(WeightFormat):
    """W = U^T (s (2 q / (2^bits - 1) - 1)) V D^-1: one grid for a whole matrix that was made incoherent before.

    Encoding, with H = E[x x^T] of the inputs:

        H <- H / mean(diag H) + damping I;  D = (diag H / diag W^T W)^(1/4);  W <- W D, H <- D^-1 H D^-1
        W <- U W V^T, H <- V H V^T          with U, V random orthogonal (Kronecker products, see `incoherence`)
        s = clip ||W||_F / sqrt(m n)        q = LDLQ of (2^bits - 1)/2 (W / s + 1), clamped to 0 .. 2^bits - 1

    Stored: `codes` (rows, packed), `scale` (one float32), and where there is processing `rescale` (D, float16 a column)
    and `seed` (one int32) from which U and V are drawn again.

    Attributes:
        bits: 1..8 a weight.
        rounding: "ldlq"; "ldlq-rg", which goes through the columns by falling diag H and adds greedy passes; or
            "nearest", which uses H for D alone.
        processing: False leaves out D, U and V (the paper's ablation).
        clip: the paper's rho, the edge of the grid in root mean squares of the turned W.
        damping: alpha, relative to the mean of diag H.
        seed: of U and V.

    Raises:
        ValueError: in `encode`, without statistics or for weights that are not finite.
    """

    bits: int = 2
    rounding: Literal["ldlq", "ldlq-rg", "nearest"] = "ldlq"
    processing: bool = True
    clip: float = 2.4
    damping: float = 0.01
    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)

    def validate(self) -> None:
        """Check bits, clip, damping and seed."""
        if not 1 <= self.bits <= 8:
            raise ValueError(f"QuIP.bits must be 1 to 8, got {self.bits}")
        if not self.clip > 0:
            raise ValueError(f"QuIP.clip must be above 0 (the paper takes 2.4), got {self.clip}")
        if not self.damping > 0:
            raise ValueError(
                f"QuIP.damping must be above 0, or H may not be invertible (the paper: 0.01), got {self.damping}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"QuIP.seed must be between 0 and 2^31 - 1, got {self.seed}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Turn, round with feedback, pack."""
        check_weight(weight, "QuIP")
        moment = damped(self.learned(statistics).required("second_moment").to(weight.device).double(), self.damping)
        weight = weight.double()
        stored: Stored = {}
        if self.processing:
            rescale = balancing_scales(weight, moment)
            stored = {
                "rescale": rescale.half(),
                "seed": torch.tensor([self.seed], dtype=torch.int32, device=weight.device),
            }
            moment = moment / rescale / rescale[:, None]
            turn = kronecker_rotation(weight.shape[1], self.seed)
            moment = turn.apply(turn.apply(moment).T)
        turned = self._turn(weight, stored)
        stored["scale"] = (self.clip * turned.square().mean().sqrt()).clamp(min=_SMALLEST_SCALE).float().reshape(1)
        return stored | {"codes": pack_codes(self._round(self._on_grid(turned, stored), moment), self.bits)}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Look the grid points up, turn back, undo the rescaling."""
        codes = unpack_codes(stored["codes"], self.bits, shape[1])
        values = (codes * (2 / self._top) - 1) * stored["scale"]
        if not self.processing:
            return values
        seed = int(stored["seed"])
        values = kronecker_rotation(shape[1], seed).invert(values)
        values = kronecker_rotation(shape[0], seed + 1).invert(values.T).T
        return values / stored["rescale"].float()

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to the nearest points of the same grid, in the same rotation."""
        check_weight(weight, "QuIP")
        codes = self._nearest(self._on_grid(self._turn(weight.double(), stored), stored))[1]
        return stored | {"codes": pack_codes(codes.long(), self.bits)}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The codes, 16 bits a column and 32 each for scale and seed."""
        rows, columns = shape
        extra = 16 * columns + 32 if self.processing else 0
        return (8 * rows * packed_bytes(columns, self.bits) + 32 + extra) / (rows * columns)

    @property
    def _top(self) -> int:
        out: int = 2**self.bits - 1
        return out

    def _turn(self, weight: Tensor, stored: Stored) -> Tensor:
        """U W D V^T."""
        if not self.processing:
            return weight
        seed = int(stored["seed"])
        weight = kronecker_rotation(weight.shape[1], seed).apply(weight * stored["rescale"].to(weight.dtype))
        return kronecker_rotation(weight.shape[0], seed + 1).apply(weight.T).T

    def _on_grid(self, turned: Tensor, stored: Stored) -> Tensor:
        """Numbers of which the whole ones between 0 and 2^bits - 1 can be stored."""
        return self._top / 2 * (turned / stored["scale"].to(turned.dtype) + 1)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = x.round().clamp(0, self._top)
        return codes, codes

    def _round(self, weight: Tensor, moment: Tensor) -> Tensor:
        """The codes of numbers on the grid."""
        if self.rounding == "nearest":
            return self._nearest(weight)[1].long()
        if self.rounding == "ldlq":
            return ldlq(weight, feedback_factor(moment), self._nearest)[1].long()
        order = moment.diagonal().argsort(descending=True)
        weight, moment = weight[:, order], moment[order][:, order]
        rounded, codes = ldlq(weight, feedback_factor(moment), self._nearest)
        codes = descend(weight, rounded, codes, moment, self._nearest, passes=GREEDY_PASSES)[1]
        return codes[:, order.argsort()].long()
