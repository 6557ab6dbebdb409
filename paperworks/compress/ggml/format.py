"""ggml's block formats as weight formats: a layer can keep the bytes that a GGUF file holds."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.ggml import blocks as ggml
from paperworks.core.errors import unknown
from paperworks.kernels.packed import Grids

# What llama.cpp writes where rows are no multiple of 256 (its llama-quant.cpp).
K_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, kw_only=True)
class GGML(WeightFormat):
    """A block format of ggml by name ("Q8_0", "Q4_0", "Q4_1", "Q6_K" ...); blocks run along rows.

    Attributes:
        kind: the block format.
        fallback: another for matrices whose rows are not whole blocks of `kind`; `K_FALLBACKS` has llama.cpp's.
    """

    kind: str
    fallback: str | None = None

    def validate(self) -> None:
        """Check the names."""
        for name in (self.kind, self.fallback):
            if name is not None and name not in ggml.BLOCKS:
                raise ValueError(unknown("ggml type", name, ggml.BLOCKS))

    def kind_for(self, columns: int) -> str:
        """The block format of a matrix with rows of so many values. Raises `ValueError` if none fits."""
        values = ggml.BLOCKS[self.kind].values
        if columns % values == 0:
            return self.kind
        if self.fallback is not None and columns % ggml.BLOCKS[self.fallback].values == 0:
            return self.fallback
        advice = f"; set fallback={K_FALLBACKS[self.kind]!r}, as llama.cpp does" if self.kind in K_FALLBACKS else ""
        raise ValueError(f"{self.kind} needs rows of a multiple of {values} values, got {columns}{advice}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The raw blocks (rows, bytes a row)."""
        check_weight(weight, f"GGML(kind={self.kind!r})")
        return {"blocks": ggml.encode(weight.detach().float(), self.kind_for(weight.shape[1]))}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """The weight."""
        return ggml.decode(stored["blocks"], self.kind_for(shape[1])).view(shape)

    def decode_as(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The weight in `dtype`, rounded once, piece by piece."""
        return ggml.decode(stored["blocks"], self.kind_for(shape[1]), dtype=dtype).view(shape)

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """The grid of Q4_0, Q4_1 and Q4_K blocks."""
        parts = ggml.four_bit_parts(stored["blocks"], self.kind_for(shape[1]))
        if parts is None:
            return None
        codes, scales, minima = parts
        return Grids(codes[None], scales[None], (minima + 8 * scales)[None])

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The block's bytes over its values, in bits."""
        return ggml.BLOCKS[self.kind_for(shape[1])].bits_per_value
