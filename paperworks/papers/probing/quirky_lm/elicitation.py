"""Measures for eliciting latent knowledge (Mallen, Brumley, Kharchenko & Belrose 2023, arXiv:2312.01037).

How much of what a model knows but does not say a probe recovers, which layer to read, and whether a context is unlike
the trusted ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.probing.labels import as_cases


def gap_recovered(probe: float, output: float, ceiling: float) -> float:
    """Gap recovered, (probe - output) / (ceiling - output), of AUROCs: 0 for the model's own output, 1 for the ceiling.

    Raises:
        ValueError: when the ceiling is not above the output: there is no gap then.
    """
    if not ceiling > output:
        raise ValueError(f"the ceiling ({ceiling:g}) must lie above the model's output ({output:g}): there is no gap")
    return (probe - output) / (ceiling - output)


def earliest_informative(aurocs: Sequence[float], share: float = 0.95) -> int:
    """The first layer whose AUROC exceeds 1/2 by `share` of what the best layer's does, in distribution.

    Raises:
        ValueError: when no layer is above 1/2, or there is none.
    """
    if not len(aurocs) or max(aurocs) <= 0.5:
        raise ValueError(f"no layer is informative: AUROCs {list(aurocs)} must have one above 1/2")
    wanted = share * (max(aurocs) - 0.5)
    return next(index for index, value in enumerate(aurocs) if value - 0.5 >= wanted)


@dataclass(frozen=True)
class TrustedGaussian:
    """A Gaussian of features in trusted contexts; what lies far from it is anomalous."""

    mean: Float[Tensor, " features"]
    factor: Float[Tensor, "features features"]  # Cholesky factor of the covariance

    @classmethod
    def of(cls, features: Float[Tensor, "n features"]) -> TrustedGaussian:
        """Fit mean and covariance.

        Raises:
            ValueError: when the covariance has no inverse: features that do not vary, or fewer cases than features.
        """
        cases = as_cases(features)
        mean = cases.mean(0)
        covariance = (cases - mean).T @ (cases - mean) / max(1, len(cases) - 1)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed) or not bool(factor.diagonal().min() > 1e-10 * factor.diagonal().max()):
            raise ValueError(
                f"{len(cases)} cases of {cases.shape[1]} features have a covariance without inverse: give more cases, "
                "or drop features that do not vary or repeat others"
            )
        return cls(mean, factor)

    def distance(self, features: Float[Tensor, "n features"]) -> Float[Tensor, " n"]:
        """The Mahalanobis distance, sqrt((x - mean)^T S^-1 (x - mean)), of each case."""
        apart = (as_cases(features) - self.mean).T
        return torch.linalg.solve_triangular(self.factor, apart, upper=False).norm(dim=0)
