"""Incoherence processing (QuIP, Chee et al. 2023, arXiv:2307.13304): turn a matrix so that no entry stands out.

W is mu-incoherent if max|W_ij| <= mu ||W||_F / sqrt(m n). Random orthogonal matrices on both sides make any matrix
so; with H turned along, the proxy loss tr(E H E^T) is the same before and after. QuIP turns by Kronecker products of
two small random orthogonal matrices and a permutation, drawn from a seed.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def incoherence(weight: Float[Tensor, "rows columns"]) -> float:
    """mu of a matrix: its largest magnitude over the root mean square; 1 is the least there is."""
    return float(weight.abs().max() / weight.square().mean().sqrt())


class KroneckerRotation:
    """x -> Q x over the last dimension: permute, then multiply by A (p x p) and B (q x q), n = p q near a square.

    Costs p + q products a number instead of n. The same seed and width give the same Q.
    """

    def __init__(self, width: int, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.permutation: Int[Tensor, " width"] = torch.randperm(width, generator=draws)
        self.restored = self.permutation.argsort()
        self.sizes = near_square(width)
        self.matrices = [random_orthogonal(size, draws) for size in self.sizes]

    def apply(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Q x."""
        left, right = (matrix.to(x) for matrix in self.matrices)
        grid = x.index_select(-1, self.permutation.to(x.device)).reshape(-1, *self.sizes)
        return (left @ grid @ right.T).reshape(x.shape)

    def invert(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Q^T x."""
        left, right = (matrix.to(x) for matrix in self.matrices)
        grid = x.reshape(-1, *self.sizes)
        return (left.T @ grid @ right).reshape(x.shape).index_select(-1, self.restored.to(x.device))


@lru_cache(maxsize=64)
def kronecker_rotation(width: int, seed: int) -> KroneckerRotation:
    """The rotation of a width and a seed, made once."""
    return KroneckerRotation(width, seed)


def near_square(width: int) -> tuple[int, int]:
    """p <= q with p q = width, as near to each other as can be; (1, width) for a prime."""
    small = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return small, width // small


def random_orthogonal(size: int, draws: torch.Generator) -> Float[Tensor, "size size"]:
    """An orthogonal matrix, uniform over all of them, float64."""
    matrix, triangle = torch.linalg.qr(torch.randn(size, size, generator=draws, dtype=torch.float64))
    out: Tensor = matrix * triangle.diagonal().sign()  # without the signs neither uniform nor the same on all machines
    return out


def damped(moment: Float[Tensor, "columns columns"], damping: float) -> Float[Tensor, "columns columns"]:
    """H scaled to mean diagonal 1, plus `damping` on the diagonal; the identity where no input was ever seen."""
    scale = moment.diagonal().mean()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment / scale + damping * eye if scale > 0 else eye


def balancing_scales(
    weight: Float[Tensor, "rows columns"], moment: Float[Tensor, "columns columns"]
) -> Float[Tensor, " columns"]:
    """D = (diag H / diag W^T W)^(1/4), for W D and D^-1 H D^-1, rounded to float16 as it will be stored.

    It shares the spread of magnitudes between the two. Its overall size cancels against the scale of the grid, so it is
    divided by its geometric mean and kept within what float16 holds to three digits.
    """
    power, energy = weight.square().sum(0), moment.diagonal()
    smallest = 1e-12 * power.mean().clamp(min=1e-30)
    scales = (energy.clamp(min=1e-12) / power.clamp(min=smallest)) ** 0.25
    scales = scales / scales.log().mean().exp()
    return scales.clamp(2.0**-8, 2.0**8).half().to(weight.dtype)
