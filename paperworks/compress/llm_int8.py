"""LLM.int8(): eight bits for all inputs but the few that are outliers (Dettmers et al. 2022, arXiv:2208.07339)."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.compress.activations import dynamic_int8
from paperworks.compress.format import Stored
from paperworks.compress.integer_product import int8_product
from paperworks.compress.uniform import Int8


@dataclass(frozen=True, kw_only=True)
class LLMInt8(Int8):
    """y = x_O W_O^T + (int8 x_rest)(int8 W_rest)^T with O the inputs that reach `threshold` anywhere in the call.

    Vector-wise scales: one for each token, found without the outliers, and one for each row of W. The outlier columns
    are decoded from int8, as bitsandbytes does (the paper keeps them in float16), and multiplied in the input's dtype.

    Attributes:
        threshold: alpha of Section 3.2. 0 makes every input an outlier (bitsandbytes means the opposite by 0: none).
    """

    threshold: float = 6.0

    def validate(self) -> None:
        """Check the threshold."""
        super().validate()
        if not self.threshold >= 0:
            raise ValueError(
                f"LLMInt8.threshold must not be negative, got {self.threshold}; "
                "float('inf') turns the decomposition off"
            )

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
            out = out + (flat[:, columns] @ dense.to(x.dtype).t()).float()
        return out.to(x.dtype).view(*x.shape[:-1], shape[0])


def outlier_columns(x: Float[Tensor, "tokens columns"], threshold: float = 6.0) -> Bool[Tensor, " columns"]:
    """Return which inputs reach the threshold in some token."""
    return (x.abs() >= threshold).any(0)


def emergent_features(
    hidden: Float[Tensor, "layers tokens features"], threshold: float = 6.0
) -> Bool[Tensor, " features"]:
    """Return the outlier features of Section 4: |x| >= 6 in at least 25% of layers and 6% of sequence positions.

    A position counts where the feature is large in any layer, a layer where it is large at any position.
    """
    large = hidden.abs() >= threshold
    layers, positions = large.any(1).float().mean(0), large.any(0).float().mean(0)
    return (layers >= 0.25) & (positions >= 0.06) & (large.any(0).any(0))
