"""Vector quantization: groups of weights replaced by one of a few vectors that k-means finds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.additive_codes import k_means, nearest_entry
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes


@dataclass(frozen=True, kw_only=True)
class KMeansVQ(WeightFormat):
    """W_ij = C[b_ij]: group j of row i is one of the vectors of a codebook that the whole matrix shares.

    The plainest format whose values can be trained while the codes stay, and the codes while the values stay (see
    `pv_tuning`). With `group=1` it is a scalar format with levels of its own.

    Stored: `codes` (rows, packed) and `codebook` (codes, group) float16.

    Attributes:
        group: weights in a row that share a code.
        codes: vectors in the codebook, a power of two: log2(codes) / group bits a weight.
        clustering: iterations of k-means.
        seed: of k-means.

    Raises:
        ValueError: in `encode`, for a number of columns that `group` does not divide.
    """

    group: int = 4
    codes: int = 16
    clustering: int = 25
    seed: int = 0

    continuous: ClassVar[tuple[str, ...]] = ("codebook",)

    def validate(self) -> None:
        """Check that the numbers are in range."""
        if self.group < 1:
            raise ValueError(f"KMeansVQ.group must be at least 1, got {self.group}")
        if self.codes not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"KMeansVQ.codes must be a power of two from 2 to 256, got {self.codes}")
        if self.clustering < 1:
            raise ValueError(f"KMeansVQ.clustering must be at least 1, got {self.clustering}")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codes.bit_length() - 1

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Cluster the groups; the codes are the centres nearest to them."""
        check_weight(weight, "KMeansVQ")
        self._check_columns(weight.shape[1])
        vectors = weight.detach().float().reshape(-1, self.group)
        draws = torch.Generator().manual_seed(self.seed)
        codebook = k_means(vectors, self.codes, self.clustering, draws).half()
        return self.reencode(weight, {"codebook": codebook})

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Look the vectors up."""
        codes = self.unpack(stored["codes"], shape).reshape(-1)
        return stored["codebook"].float().index_select(0, codes).view(shape)

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Take the nearest vectors of the same codebook."""
        check_weight(weight, "KMeansVQ")
        vectors = weight.detach().float().reshape(-1, self.group)
        codes = nearest_entry(vectors, stored["codebook"].detach().float())
        return stored | {"codes": self.pack(codes.view(weight.shape[0], -1, 1))}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """log2(codes) / group for the codes, and 16 for each number of the codebook."""
        rows, columns = shape
        self._check_columns(columns)
        codes = 8 * rows * packed_bytes(columns // self.group, self.bits)
        return (codes + 16 * self.codes * self.group) / (rows * columns)

    def pack(self, codes: Int[Tensor, "rows groups 1"]) -> Tensor:
        """`codes` as they are stored."""
        return pack_codes(codes[..., 0], self.bits)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Int[Tensor, "rows groups 1"]:
        """Undo `pack`."""
        return unpack_codes(packed, self.bits, shape[1] // self.group).int()[..., None]

    def _check_columns(self, columns: int) -> None:
        if columns % self.group:
            raise ValueError(
                f"KMeansVQ.group {self.group} does not divide the {columns} columns of this weight: choose one that "
                "does, or leave the layer out of targets"
            )
