"""QuIP# (Tseng, Chee, Sun, Kuleshov & De Sa 2024, arXiv:2402.04396): Hadamard incoherence and a lattice codebook."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.ldlq import descend, feedback_factor, ldlq
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats import e8p
from paperworks.compress.formats.incoherence import damped
from paperworks.kernels import hadamard
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes

GROUP = 8  # weights a code: the dimension of the E8 lattice

# By bits: what a root mean square of 1 is multiplied by before rounding, and the residual before the second rounding.
_SCALES = {2: (1.03, None), 3: (0.98, 2.04), 4: (1.03, 3.45)}


@dataclass(frozen=True, kw_only=True)
class QuIPSharp(WeightFormat):
    """W = S_U Q_m^T (scale * points[codes]) Q_n S_V with Q Hadamard / sqrt(n) and S random signs.

    Encoding turns W and H = E[x x^T] by randomized Hadamard transforms, divides by the root mean square over 1.03,
    rounds 8 columns at a time by block LDLQ with the nearest point of E8P (see `e8p`), and then goes over the blocks
    `passes` times (see `ldlq.descend`). 3 and 4 bits round the residual once more, to a codebook of 256 points or to
    E8P. Widths without a Hadamard matrix use another orthogonal one (see `nn.hadamard`).

    Stored: `codes` (rows, columns / 8) int16, with a second codebook `residual_codes` (uint8 or int16); `scale` (one
    float32); `signs_out` and `signs_in`, a bit each. With `signs="float16"` they are numbers, which may be trained
    together with the scale while the codes stay (Section 5 of the paper).

    Attributes:
        bits: 2, 3 or 4 a weight.
        passes: over all blocks after LDLQ.
        signs: "bits" or "float16".
        damping: relative to the mean of diag H.
        seed: of the signs.

    Raises:
        ValueError: in `encode`, for a number of columns that 8 does not divide, or without statistics.
    """

    bits: int = 2
    passes: int = 10
    signs: Literal["bits", "float16"] = "bits"
    damping: float = 0.01
    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)
    continuous: ClassVar[tuple[str, ...]] = ("scale", "signs_out", "signs_in")

    def validate(self) -> None:
        """Check bits, passes, damping and seed."""
        if self.bits not in _SCALES:
            raise ValueError(f"QuIPSharp.bits must be 2, 3 or 4 (one or two codebooks of 8 weights), got {self.bits}")
        if self.passes < 0:
            raise ValueError(f"QuIPSharp.passes must be 0 or more, got {self.passes}")
        if not self.damping > 0:
            raise ValueError(f"QuIPSharp.damping must be above 0 (0.01 is usual), got {self.damping}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"QuIPSharp.seed must be between 0 and 2^31 - 1, got {self.seed}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Turn, round block after block with feedback, go over it again."""
        check_weight(weight, "QuIPSharp")
        rows, columns = weight.shape
        _check_columns(columns)
        moment = damped(self.learned(statistics).required("second_moment").to(weight.device).float(), self.damping)
        draws = torch.Generator().manual_seed(self.seed)
        stored = self._pack_signs("signs_out", rows, draws) | self._pack_signs("signs_in", columns, draws)
        stored = {name: tensor.to(weight.device) for name, tensor in stored.items()}
        signs = self._signs(stored, "signs_in", columns)
        moment = hadamard.transform(hadamard.transform(moment * signs * signs[:, None]).T)
        turned = self._turn(weight.float(), stored)
        root = turned.square().mean().sqrt().clamp(min=1e-30)  # any scale will do for a matrix of zeros
        stored["scale"] = (root / _SCALES[self.bits][0]).reshape(1)
        scaled = turned / stored["scale"]
        rounded, codes = ldlq(scaled, feedback_factor(moment, GROUP), self._nearest, GROUP)
        if self.passes:
            codes = descend(scaled, rounded, codes, moment, self._nearest, GROUP, self.passes)[1]
        return stored | self._pack(codes)

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Look the points up, turn back."""
        values = self._points(stored["codes"], stored.get("residual_codes")).view(shape) * stored["scale"].float()
        values = hadamard.transform(values, inverse=True) * self._signs(stored, "signs_in", shape[1])
        values = hadamard.transform(values.T, inverse=True) * self._signs(stored, "signs_out", shape[0])
        return values.T

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to the nearest points with the same signs and scale."""
        check_weight(weight, "QuIPSharp")
        vectors = (self._turn(weight.float(), stored) / stored["scale"].float()).reshape(-1, GROUP)
        return stored | self._pack(self._nearest(vectors)[1].view(weight.shape[0], -1))

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The codes, the signs, and 32 bits for the scale."""
        rows, columns = shape
        _check_columns(columns)
        signs = sum(8 * packed_bytes(n, 1) if self.signs == "bits" else 16 * n for n in shape)
        return (self.bits * rows * columns + signs + 32) / (rows * columns)

    def _turn(self, weight: Tensor, stored: Stored) -> Tensor:
        """Q_m S_U W S_V Q_n^T; signs that were trained are divided out."""
        weight = hadamard.transform(weight / self._signs(stored, "signs_in", weight.shape[1]))
        return hadamard.transform(weight.T / self._signs(stored, "signs_out", weight.shape[0])).T

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round vectors of 8; return points and codes, one or two a vector."""
        factor = _SCALES[self.bits][1]
        first = e8p.nearest(x)
        points = e8p.table(x.device)[first]
        if factor is None:
            return points, first[:, None]
        residual = (x - points) * factor
        second = e8p.nearest_residual(residual) if self.bits == 3 else e8p.nearest(residual)
        book = e8p.residual_table(x.device) if self.bits == 3 else e8p.table(x.device)
        return points + book[second] / factor, torch.stack((first, second), 1)

    def _points(self, codes: Tensor, residual_codes: Tensor | None) -> Float[Tensor, "vectors 8"]:
        points = e8p.table(codes.device).index_select(0, codes.flatten().int() & 0xFFFF)
        factor = _SCALES[self.bits][1]
        if residual_codes is None or factor is None:
            return points
        book = e8p.residual_table(codes.device) if self.bits == 3 else e8p.table(codes.device)
        return points + book.index_select(0, residual_codes.flatten().int() & 0xFFFF) / factor

    def _pack(self, codes: Int[Tensor, "rows codes"]) -> Stored:
        if self.bits == 2:
            return {"codes": codes.to(torch.int16)}
        first, second = codes[:, 0::2], codes[:, 1::2]
        narrow = torch.uint8 if self.bits == 3 else torch.int16
        return {"codes": first.to(torch.int16).contiguous(), "residual_codes": second.to(narrow).contiguous()}

    def _pack_signs(self, name: str, count: int, draws: torch.Generator) -> Stored:
        negative = torch.randint(2, (1, count), generator=draws)
        if self.signs == "float16":
            return {name: (1 - 2 * negative[0]).half()}
        return {name: pack_codes(negative, 1)[0]}

    def _signs(self, stored: Stored, name: str, count: int) -> Float[Tensor, " count"]:
        signs = stored[name]
        if signs.is_floating_point():
            return signs.float()
        return 1 - 2 * unpack_codes(signs[None], 1, count)[0].float()


def _check_columns(columns: int) -> None:
    if columns % GROUP:
        raise ValueError(
            f"QuIPSharp rounds 8 columns at a time and this weight has {columns}: leave the layer out of targets, "
            "or use QuIP, which takes any shape"
        )
