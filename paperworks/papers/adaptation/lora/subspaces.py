"""How much of one adapter's input directions lies in another's (Hu et al. 2021, arXiv:2106.09685, Section 7)."""

import torch
from jaxtyping import Float
from torch import Tensor


def subspace_similarity(
    one: Float[Tensor, "rank columns"], other: Float[Tensor, "other_rank columns"]
) -> Float[Tensor, "rank other_rank"]:
    """Return phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) at [i - 1, j - 1], in float64.

    U_i and V_j are the first i and j right singular vectors of two matrices, largest singular value first: LoRA's
    `down` (the paper's A), or whole changes of a weight. 1: the smaller of the two subspaces lies in the larger; 0:
    they are orthogonal; max(i, j) / columns is what random ones have in the mean.

    Raises:
        ValueError: for what is no matrix, matrices of different width, and NaN or infinity.
    """
    if one.dim() != 2 or other.dim() != 2 or one.shape[1] != other.shape[1]:
        shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
        raise ValueError(f"two matrices with the same number of columns can be compared, got shapes {shapes}")
    bases = []
    for matrix in (one, other):
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("a matrix with NaN or infinity has no singular vectors")
        bases.append(torch.linalg.svd(matrix.detach().double(), full_matrices=False).Vh)
    shared = (bases[0] @ bases[1].T).square().cumsum(0).cumsum(1)
    sizes = [torch.arange(1, len(basis) + 1, device=basis.device) for basis in bases]
    return shared / torch.minimum(sizes[0][:, None], sizes[1])
