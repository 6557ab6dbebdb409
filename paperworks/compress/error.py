"""How much of a layer rounding lost."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one layer, as shares: ||W - W'|| / ||W||, and the same of its outputs on calibration data.

    `output` is None where no data was at hand.
    """

    weight: float
    output: float | None = None

    @classmethod
    def between(
        cls,
        weight: Float[Tensor, "rows columns"],
        rounded: Float[Tensor, "rows columns"],
        second_moment: Float[Tensor, "columns columns"] | None = None,
    ) -> "LayerError":
        """Compare two weights; with the inputs' second moment M also outputs: sqrt(tr E M E^T / tr W M W^T)."""
        weight = weight.detach().float()
        difference = rounded.detach().float() - weight
        share = float(difference.norm() / weight.norm().clamp(min=1e-30))
        if second_moment is None:
            return cls(share)
        moment = second_moment.to(weight.device)
        lost, whole = (float(((matrix @ moment) * matrix).sum()) for matrix in (difference, weight))
        return cls(share, (max(lost, 0.0) / max(whole, 1e-30)) ** 0.5)
