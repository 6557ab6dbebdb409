"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and their published scalings."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.core.spec import Spec
from paperworks.nn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class RoPEScaling(Spec):
    """How rotary frequencies are changed to reach beyond the trained length."""

    def frequencies(self, rope: "RoPE", dim: int, length: int) -> Float[Tensor, " half"]:
        """Dim / 2 angular frequencies (radians per position) for sequences of at most `length` tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not say its frequencies")

    def amplitude(self) -> float:
        """The factor on cosines and sines."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Rotary(Spec):
    """Positions that turn queries and keys, so that scores depend on differences; 2-D ones are a subclass."""

    def rotated(self, head_dim: int) -> int:
        """Number of channels of a head that are turned. Raises `ValueError` if a head of this size cannot be."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it turns")

    def turn(
        self, queries: Float[Tensor, "batch heads time head_dim"], keys: Tensor, placement: Placement
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned by where the tokens stand."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it turns")


@dataclass(frozen=True, kw_only=True)
class RoPE(Rotary):
    """Rotate pairs of query and key channels by angles position * base^(-2i/dim); scores depend on differences only.

    Attributes:
        base: theta of the paper.
        fraction: the share of the head's channels that is rotated, the first ones.
        layout: which channels form a pair: "half" (i, i + dim/2; GPT-NeoX and Hugging Face) or "interleaved"
            (2i, 2i + 1; the paper, GPT-J and GGUF files of Llama).
        scaling: how frequencies change beyond the trained length.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: RoPEScaling | None = None

    def validate(self) -> None:
        """Check base and fraction."""
        if self.base <= 1:
            raise ValueError(f"RoPE.base must be above 1, got {self.base}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE.fraction must be in (0, 1], got {self.fraction}")

    def rotated(self, head_dim: int) -> int:
        """Number of channels of a head that are rotated. Raises `ValueError` if they cannot be paired."""
        dim = int(head_dim * self.fraction)
        if dim < 2 or dim % 2:
            raise ValueError(
                f"RoPE rotates pairs of channels, but head_dim {head_dim} x fraction {self.fraction} = {dim}; "
                "choose a head_dim (dim / heads) or a fraction that gives an even number"
            )
        return dim

    def unscaled(self, dim: int) -> Float[Tensor, " half"]:
        """base^(-2i/dim) for i = 0 .. dim/2 - 1."""
        return 1.0 / self.base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def frequencies(self, dim: int, length: int = 0) -> Float[Tensor, " half"]:
        """The frequencies in radians per position, scaled for sequences of at most `length` tokens."""
        return self.unscaled(dim) if self.scaling is None else self.scaling.frequencies(self, dim, length)

    def table(
        self, positions: Int[Tensor, "batch time"], dim: int, length: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch 1 time dim"], Float[Tensor, "batch 1 time dim"]]:
        """(cosines, signed sines), angles computed in float32: half precision fails beyond position 256."""
        frequencies = self.frequencies(dim, length).to(positions.device)
        angles = positions.float()[:, None, :, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scaling is not None:
            cos, sin = cos * self.scaling.amplitude(), sin * self.scaling.amplitude()
        if self.layout == "half":
            return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
        return cos.repeat_interleave(2, -1).to(dtype), torch.stack((-sin, sin), -1).flatten(-2).to(dtype)

    def rotate(
        self, x: Float[Tensor, "batch heads time head_dim"], cos: Tensor, sin: Tensor
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Rotate the first channels of x; `cos` and `sin` come from `table`."""
        dim = cos.shape[-1]
        if dim < x.shape[-1]:
            return torch.cat((self.rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
        half = self.layout == "half"
        partner = x.roll(dim // 2, -1) if half else x.unflatten(-1, (dim // 2, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x * cos, partner, sin)

    def turn(
        self, queries: Float[Tensor, "batch heads time head_dim"], keys: Tensor, placement: Placement
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned by their positions."""
        cos, sin = self.tables(placement, queries.shape[-1], queries.dtype)
        return self.rotate(queries, cos, sin), self.rotate(keys, cos, sin)

    def tables(self, placement: Placement, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(Cosines, signed sines) for the tokens of a placement, computed once for all layers."""
        key = ("rope", self, head_dim, dtype)
        if key in placement.memo:
            out: tuple[Tensor, Tensor] = placement.memo[key]
            return out
        dim = self.rotated(head_dim)
        assert placement.positions is not None
        if placement.default_positions and placement.horizon > placement.time:  # decoding: the cache keeps the table
            if key not in placement.tables:
                everywhere = torch.arange(placement.horizon, device=placement.device)[None]
                placement.tables[key] = self.table(everywhere, dim, placement.horizon, dtype)
            cos, sin = placement.tables[key]
            here = slice(placement.start, placement.start + placement.time)
            found = cos[:, :, here], sin[:, :, here]
        else:
            found = self.table(placement.positions, dim, placement.horizon, dtype)
        placement.memo[key] = found
        return found


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RoPEScaling):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float

    def validate(self) -> None:
        """Check the factor."""
        _check_factor(self.factor, self)

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """Frequency / factor."""
        return rope.unscaled(dim) / self.factor


@dataclass(frozen=True, kw_only=True)
class NTKScaling(RoPEScaling):
    """NTK-aware scaling (bloc97 2023): base * factor^(dim / (dim - 2)), dividing the lowest frequency by factor."""

    factor: float

    def validate(self) -> None:
        """Check the factor."""
        _check_factor(self.factor, self)

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """The frequencies of the enlarged base."""
        return _enlarged_base(rope, dim, self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(RoPEScaling):
    """NTK scaling that grows with the sequence (emozilla 2023): factor * T / T0 - (factor - 1) once T exceeds T0.

    T is the stream's horizon: the length without a cache, the cache's capacity with one. So all keys of a cache are
    rotated by one set of frequencies, and decoding in chunks equals decoding at once.
    """

    factor: float
    trained_length: int

    def validate(self) -> None:
        """Check the factor."""
        _check_factor(self.factor, self)

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """The frequencies of the base enlarged for `length` tokens."""
        if length <= self.trained_length:
            return rope.unscaled(dim)
        return _enlarged_base(rope, dim, self.factor * length / self.trained_length - (self.factor - 1))


@dataclass(frozen=True, kw_only=True)
class YaRNScaling(RoPEScaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow channels, keep fast ones, sharpen the scores.

    Channels that turn more than `fast` times over the trained length are kept, those that turn less than `slow`
    times are divided by `factor`, with a ramp between; cosines and sines are multiplied by 0.1 ln(factor) + 1.
    """

    factor: float
    trained_length: int
    fast: float = 32.0
    slow: float = 1.0

    def validate(self) -> None:
        """Check the factor."""
        _check_factor(self.factor, self)

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """The mixture of kept and interpolated frequencies."""

        def channel(turns: float) -> float:
            return dim * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

        low = float(max(math.floor(channel(self.fast)), 0))
        high = float(min(math.ceil(channel(self.slow)), dim - 1))
        if low == high:
            high += 0.001  # a ramp of no width: keep the division finite
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = rope.unscaled(dim)
        return kept / self.factor * ramp + kept * (1 - ramp)

    def amplitude(self) -> float:
        """0.1 ln(factor) + 1."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RoPEScaling):
    """Llama 3.1's rule (arXiv:2407.21783): wavelengths beyond trained_length / low are stretched by `factor`."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    trained_length: int = 8192

    def validate(self) -> None:
        """Check the factor and the order of the cut-offs."""
        _check_factor(self.factor, self)
        if self.high <= self.low:
            raise ValueError(f"Llama3Scaling.high must exceed low, got high={self.high} and low={self.low}")

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """The frequencies, continuous in the wavelength at both cut-offs."""
        kept = rope.unscaled(dim)
        wavelength = 2 * math.pi / kept
        blend = ((self.trained_length / wavelength - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - blend) * kept / self.factor + blend * kept


@dataclass(frozen=True, kw_only=True)
class LongRoPEScaling(RoPEScaling):
    """LongRoPE as in Phi-3 (arXiv:2404.14219): each frequency divided by a searched factor, one list for short horizons
    (at most trained_length) and one for long; cosines and sines times sqrt(1 + ln(extension) / ln(trained_length)).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained_length: int
    extended_length: int

    def frequencies(self, rope: RoPE, dim: int, length: int) -> Tensor:
        """The frequencies divided by the list that fits `length`."""
        factors = self.long if length > self.trained_length else self.short
        if len(factors) != dim // 2:
            raise ValueError(f"LongRoPEScaling needs one factor for each of {dim // 2} pairs, got {len(factors)}")
        return 1.0 / (
            torch.tensor(factors, dtype=torch.float32)
            * rope.base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        )

    def amplitude(self) -> float:
        """sqrt(1 + ln(extension) / ln(trained_length))."""
        extension = self.extended_length / self.trained_length
        return 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(self.trained_length))


def _check_factor(factor: float, scaling: RoPEScaling) -> None:
    if factor < 1:
        raise ValueError(f"{type(scaling).__name__}.factor must be at least 1, got {factor}")


def _enlarged_base(rope: RoPE, dim: int, factor: float) -> Tensor:
    base = rope.base * factor ** (dim / (dim - 2))
    out: Tensor = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return out
