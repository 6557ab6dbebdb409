"""AQLM (Egiazarian et al. 2024, arXiv:2401.06118): groups of weights as sums of learned vectors, one a codebook."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.additive_codes import beam_search, cluster, reconstruct, search_apart, tune_values
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes

STOP = 0.99  # an epoch has to bring the loss below this share of the best before


@dataclass(frozen=True, kw_only=True)
class AQLM(WeightFormat):
    """W_ij = s_i sum_m C_m[b_ijm]: group j of row i is a sum of `codebooks` vectors of length `group`, times a scale.

    Encoding minimises ||W X - What X||^2 = tr(E H E^T), H = E[x x^T]. It starts with residual k-means of the rows
    divided by their scale, then alternates: Adam on codebooks and scales with the codes fixed, a beam search over the
    codes with the rest fixed, until an epoch brings less than 1%.

    Stored: `codes` (rows, columns / group x codebooks), packed to `bits` each (int16 from 9 bits on, read as unsigned),
    `codebooks` (codebooks, 2^bits, group) float16 and `scales` (rows) float16. The codebooks serve one matrix, so that
    small matrices pay for them: `bits_per_weight` says how much.

    Attributes:
        codebooks: M, vectors added up for each group.
        bits: B of a code; a codebook has 2^B vectors.
        group: g, weights in a row that share their codes.
        epochs: at most so many rounds of Adam and beam search; 0 leaves residual k-means.
        steps: of Adam in an epoch.
        lr: of Adam, in units of a row's root mean square. The paper's 1e-4 is for rows of norm 1: 6.4e-3 root mean
            squares for rows of 4,096.
        beam: sets of codes kept while the search goes through the groups of a row.
        clustering: iterations of k-means.
        seed: of k-means.

    Raises:
        ValueError: in `encode`, for a number of columns that `group` does not divide, or without statistics.
    """

    codebooks: int = 2
    bits: int = 8
    group: int = 8
    epochs: int = 4
    steps: int = 40
    lr: float = 6.4e-3
    beam: int = 1
    clustering: int = 12
    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)
    continuous: ClassVar[tuple[str, ...]] = ("codebooks", "scales")

    def validate(self) -> None:
        """Check that the numbers are in range."""
        for name, least in (
            ("codebooks", 1),
            ("group", 1),
            ("epochs", 0),
            ("steps", 0),
            ("beam", 1),
            ("clustering", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"AQLM.{name} must be at least {least}, got {getattr(self, name)}")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"AQLM.bits must be 1 to 16 (a codebook has 2^bits vectors), got {self.bits}")
        if not self.lr > 0:
            raise ValueError(f"AQLM.lr must be above 0, got {self.lr}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Cluster, then alternate between values and codes."""
        check_weight(weight, "AQLM")
        self._check_columns(weight.shape[1])
        weight = weight.detach().float()
        moment = self.learned(statistics).required("second_moment").to(weight).contiguous()
        # A loss relative to the size of the inputs: Adam does not care, the check for progress is a ratio.
        moment = moment / moment.diagonal().mean().clamp(min=1e-30)
        scales = weight.square().mean(1).sqrt().clamp(min=1e-8)
        vectors = (weight / scales[:, None]).reshape(-1, self.group)
        draws = torch.Generator().manual_seed(self.seed)
        codebooks, codes = cluster(vectors, self.codebooks, 2**self.bits, self.clustering, draws)
        codes = codes.view(weight.shape[0], -1, self.codebooks)
        state: dict[str, Tensor] = {}
        best = math.inf
        for _ in range(self.epochs):
            codebooks, scales, loss = tune_values(weight, moment, codebooks, scales, codes, self.steps, self.lr, state)
            if loss > STOP * best:  # measured where the epoch starts
                break
            best = loss
            codes = beam_search(weight, moment, codebooks, scales, codes, self.beam)
        return {
            "codes": self.pack(codes),
            "codebooks": codebooks.half().contiguous(),
            "scales": scales.half().contiguous(),
        }

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Add the vectors up, times the scale of the row."""
        codes = self.unpack(stored["codes"], shape)
        return reconstruct(codes, stored["codebooks"].float(), stored["scales"].float())

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Search the codes again, with the codebooks and scales as they are and all inputs alike."""
        check_weight(weight, "AQLM")
        codes = self.unpack(stored["codes"], (weight.shape[0], weight.shape[1])).long()
        books, scales = stored["codebooks"].float(), stored["scales"].float()
        for _ in range(3):  # with M codebooks one search is not yet at rest
            before, codes = codes, search_apart(weight.float(), books, scales, codes, self.beam)
            if torch.equal(codes, before):
                break
        return stored | {"codes": self.pack(codes)}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """M B / g for the codes, 16 M 2^B g for the codebooks and 16 a row, over the weights of the matrix."""
        rows, columns = shape
        self._check_columns(columns)
        count = columns // self.group * self.codebooks
        codes = rows * (8 * packed_bytes(count, self.bits) if self.bits <= 8 else 16 * count)
        books = 16 * self.codebooks * 2**self.bits * self.group
        out: float = (codes + books + 16 * rows) / (rows * columns)
        return out

    def pack(self, codes: Int[Tensor, "rows groups codebooks"]) -> Tensor:
        """`codes` as they are stored."""
        flat = codes.reshape(codes.shape[0], -1)
        return pack_codes(flat, self.bits) if self.bits <= 8 else flat.to(torch.int16)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Int[Tensor, "rows groups codebooks"]:
        """Undo `pack`."""
        count = shape[1] // self.group * self.codebooks
        codes = unpack_codes(packed, self.bits, count).int() if self.bits <= 8 else packed.int() & 0xFFFF
        return codes.view(shape[0], -1, self.codebooks)

    def _check_columns(self, columns: int) -> None:
        if columns % self.group:
            raise ValueError(
                f"AQLM.group {self.group} does not divide the {columns} columns of this weight: choose one that does, "
                "or leave the layer out of targets"
            )
