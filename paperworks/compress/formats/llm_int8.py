"""LLM.int8(): eight bits for all inputs but the few that are outliers (Dettmers et al. 2022, arXiv:2208.07339)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.compress.calibration.activations import dynamic_int8
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored
from paperworks.compress.formats.uniform import Int8
from paperworks.kernels.integer_product import int8_product


@dataclass(frozen=True, kw_only=True)
class LLMInt8(Int8):
    """y = x_O W_O^T + (int8 x_rest)(int8 W_rest)^T with O the inputs that reach `threshold` anywhere in the call.

    Vector-wise scales: one for each token, found without the outliers, and one for each row of W. The outlier columns
    of W are multiplied in the input's dtype. They are decoded from int8, as bitsandbytes does; or, as in the paper,
    kept in float16: those that reach the threshold in calibration are stored a second time (`kept`, rows x outliers,
    and `kept_columns`, an int32 each).

    Attributes:
        threshold: alpha of Section 3.2. 0 makes every input an outlier (bitsandbytes means the opposite by 0: none).
        outliers: how the weights of outlier columns are held, "int8" or "float16"; the latter learns from data.
    """

    threshold: float = 6.0
    outliers: Literal["int8", "float16"] = "int8"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Which columns are outliers has to be seen in data, if their weights are to be kept."""
        return ("absolute_max",) if self.outliers == "float16" else ()

    def validate(self) -> None:
        """Check the threshold."""
        super().validate()
        if not self.threshold >= 0:
            raise ValueError(
                f"LLMInt8.threshold must not be negative, got {self.threshold}; "
                "float('inf') turns the decomposition off"
            )
        if self.outliers not in ("int8", "float16"):
            raise ValueError(f"LLMInt8.outliers must be 'int8' or 'float16', got {self.outliers!r}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Codes and scales, and the weights of the columns whose inputs were outliers in calibration."""
        stored = super().encode(weight)
        if self.outliers == "float16":
            loudest = self.learned(statistics).required("absolute_max").to(weight.device)
            stored |= _kept(weight, (loudest >= self.threshold).nonzero()[:, 0].int())
        return stored

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Code * scale, and the kept columns as they are."""
        decoded = super().decode(stored, shape)
        if "kept" in stored:
            decoded[:, stored["kept_columns"].long()] = stored["kept"].float()
        return decoded

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round again; the same columns are kept."""
        fresh = super().encode(weight)
        return fresh | _kept(weight, stored["kept_columns"]) if "kept" in stored else fresh

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """Multiply the outliers in floating point and the rest as int8."""
        flat = x.reshape(-1, shape[1])
        outlier = outlier_columns(flat, self.threshold)
        columns = outlier.nonzero()[:, 0]
        regular = flat.masked_fill(outlier, 0) if len(columns) else flat
        codes, scale = dynamic_int8(regular)
        weight, weight_scale = stored["codes"], stored["scales"].float()
        out = int8_product(codes, weight).float() * scale * weight_scale
        if len(columns):
            dense = weight[:, columns].float() * weight_scale[:, None]
            if "kept" in stored:
                there = (columns[:, None] == stored["kept_columns"]).nonzero()  # (place in columns, place in kept)
                dense[:, there[:, 0]] = stored["kept"][:, there[:, 1]].float()
            out = out + (flat[:, columns] @ dense.to(x.dtype).t()).float()
        return out.to(x.dtype).view(*x.shape[:-1], shape[0])

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The bits of codes and scales; each kept column adds 16 a row and 32, and only data tell how many."""
        return super().bits_per_weight(shape)


def _kept(weight: Tensor, columns: Int[Tensor, " outliers"]) -> Stored:
    kept = weight.detach()[:, columns.long()]
    if float(kept.abs().max() if kept.numel() else 0) > torch.finfo(torch.float16).max:
        raise ValueError("LLMInt8 keeps outlier weights in float16, and one is too large; set outliers='int8'")
    return {"kept": kept.half().contiguous(), "kept_columns": columns}


def outlier_columns(x: Float[Tensor, "tokens columns"], threshold: float = 6.0) -> Bool[Tensor, " columns"]:
    """Which inputs reach the threshold in some token."""
    return (x.abs() >= threshold).any(0)


def emergent_features(
    hidden: Float[Tensor, "layers tokens features"], threshold: float = 6.0
) -> Bool[Tensor, " features"]:
    """The outlier features of Section 4: |x| >= 6 in at least 25% of layers and 6% of sequence positions.

    A position counts where the feature is large in any layer, a layer where it is large at any position.
    """
    large = hidden.abs() >= threshold
    layers, positions = large.any(1).float().mean(0), large.any(0).float().mean(0)
    return (layers >= 0.25) & (positions >= 0.06) & (large.any(0).any(0))
