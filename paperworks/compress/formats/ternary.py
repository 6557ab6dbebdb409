"""Weights of -1, 0 and 1 as stored and multiplied after training: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn import functional as F

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes
from paperworks.kernels.integer_product import int8_product
from paperworks.nn.ternary import eight_bits, pack, ternary, unpack

_SAME = 1e-6  # magnitudes that differ by less, relatively, are one: rounding of sign * scale in float32


@dataclass(frozen=True, kw_only=True)
class Ternary(WeightFormat):
    """W is near signs * scale: one of three values a weight, one float32 scale a matrix, as `nn.BitLinear` trains it.

    scale = mean |W| and signs = RoundClip(W / scale, -1, 1). A matrix that is ternary already is stored without any
    error, whatever its share of zeros; so what `nn.BitLinear` trained comes out as it was. `multiply` is
    int8 inputs times signs, summed in integers, times both scales.

    Attributes:
        packing: "digits", five ternary digits a byte (3^5 = 243): 1.6 bits a weight; or "bits", four a byte: 2 bits.
        activations: whether inputs are rounded to eight bits a token, as in training; otherwise they are left alone.
        norm: eps of the RMSNorm without gain that inputs pass first, for layers trained with one (`nn.BitLinear` has
            1e-8); None for no norm.
    """

    packing: Literal["digits", "bits"] = "digits"
    activations: bool = True
    norm: float | None = None

    continuous: ClassVar[tuple[str, ...]] = ("scale",)

    def validate(self) -> None:
        """Check the norm's eps."""
        if self.norm is not None and not self.norm >= 0:
            raise ValueError(f"Ternary.norm is an eps of 0 or more, or None for no norm, got {self.norm}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Packed signs and the scale. Raises `ValueError` for what is not a finite matrix."""
        check_weight(weight, "Ternary")
        signs, scale = _signs_and_scale(weight.detach().float())
        whole = signs.to(torch.int8)
        codes = pack(whole) if self.packing == "digits" else pack_codes(whole + 1, 2)
        return {"codes": codes, "scale": scale.reshape(1)}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Signs * scale."""
        return self.signs(stored, shape) * stored["scale"]

    def prepare(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... columns"]:
        """Normalize the inputs, where the layer was trained so."""
        return x if self.norm is None else F.rms_norm(x, (x.shape[-1],), None, self.norm)

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """The integer product times the inputs' steps and the scale."""
        if not self.activations:
            return super().multiply(x, stored, shape)
        wide = x if x.dtype == torch.float64 else x.float()
        integers, step = eight_bits(wide.reshape(-1, shape[1]))
        product = int8_product(integers.to(torch.int8), self.signs(stored, shape)).to(wide.dtype)
        return (product * step * stored["scale"]).to(x.dtype).view(*x.shape[:-1], shape[0])

    def signs(self, stored: Stored, shape: tuple[int, int]) -> Int8[Tensor, "rows columns"]:
        """The weights as integers -1, 0 and 1."""
        if self.packing == "digits":
            return unpack(stored["codes"], shape[1])
        return unpack_codes(stored["codes"], 2, shape[1]).to(torch.int8) - 1

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes and scale over weights."""
        rows, columns = shape
        row = -(-columns // 5) if self.packing == "digits" else packed_bytes(columns, 2)
        return 8 * (rows * row + 4) / (rows * columns)


def _signs_and_scale(weight: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, ""]]:
    """Signs and scale; of a matrix with one magnitude besides zero, this magnitude."""
    magnitudes = weight.abs()
    top = magnitudes.max() if weight.numel() else weight.new_zeros(())
    if bool(top > 0) and not bool(((magnitudes > 0) & (magnitudes < (1 - _SAME) * top)).any()):
        return weight.sign(), top
    return ternary(weight)
