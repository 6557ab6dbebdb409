"""Adaptive rounding with linear feedback: LDLQ (QuIP, Chee et al. 2023, arXiv:2307.13304) and its block form (QuIP#).

The proxy loss of rounding W to What is l = tr((What - W) H (What - W)^T), H = E[x x^T] of the layer's inputs. With
H = (U + I) D (U + I)^T, U strictly upper triangular in blocks of g columns and D block diagonal, LDLQ rounds

    What_b = Q(W_b + (W_{<b} - What_{<b}) U_{<b,b}),    blocks b from left to right,

which no other fixed linear feedback beats. For g = 1 it is GPTQ in another order of the same sums. (QuIP's own code
factors from the other end and goes from right to left: the same method on reversed columns.)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.feedback import upper_cholesky

# Rounds a block of columns (rows, g); returns the values and the codes (rows, k) that stand for them.
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]

_LAZY = 128  # columns whose feedback is added at once, as a matrix product, to all columns right of them


def proxy_loss(difference: Float[Tensor, "rows columns"], moment: Float[Tensor, "columns columns"]) -> Tensor:
    """tr(E H E^T), which for H = E[x x^T] is the expected squared error of the layer's output."""
    return ((difference @ moment) * difference).sum()


def feedback_factor(moment: Float[Tensor, "columns columns"], width: int = 1) -> Float[Tensor, "columns columns"]:
    """U, strictly upper triangular in blocks of `width` columns, of H = (U + I) D (U + I)^T.

    Raises `ValueError` where H is not positive definite: damp it first.
    """
    columns = moment.shape[0]
    if columns % width:
        raise ValueError(f"{columns} columns do not split into blocks of {width}")
    upper = upper_cholesky(moment)
    if upper is None:
        raise ValueError("the second moment is not positive definite: raise the damping")
    blocks = upper.view(columns // width, width, columns // width, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # R_:b R_bb^-1 makes every diagonal block the identity, which is what U + I has there.
    split = upper.view(columns, columns // width, width).transpose(0, 1)
    unit = torch.linalg.solve_triangular(blocks, split, upper=True, left=False).transpose(0, 1).reshape_as(upper)
    out: Tensor = unit - torch.eye(columns, dtype=unit.dtype, device=unit.device)
    return out


def ldlq(
    weight: Float[Tensor, "rows columns"],
    feedback: Float[Tensor, "columns columns"],
    quantize: Quantize,
    width: int = 1,
) -> tuple[Float[Tensor, "rows columns"], Int[Tensor, "rows codes"]]:
    """Round block after block from left to right, each corrected by the errors made before; return values and codes.

    Plain rounding is `feedback` zero.
    """
    columns = weight.shape[1]
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    codes = []
    span = max(_LAZY // width, 1) * width
    for start in range(0, columns, span):
        stop = min(start + span, columns)
        # what all columns left of this span contribute, in one product
        wanted = weight[:, start:stop] + error[:, :start] @ feedback[:start, start:stop]
        inside = feedback[start:stop, start:stop]
        for first in range(0, stop - start, width):
            block = slice(first, first + width)
            target = wanted[:, block] + error[:, start : start + first] @ inside[:first, block]
            values, block_codes = quantize(target)
            here = slice(start + first, start + first + width)
            rounded[:, here] = values
            error[:, here] = weight[:, here] - values
            codes.append(block_codes)
    return rounded, torch.cat(codes, 1)


def descend(
    weight: Float[Tensor, "rows columns"],
    rounded: Float[Tensor, "rows columns"],
    codes: Int[Tensor, "rows codes"],
    moment: Float[Tensor, "columns columns"],
    quantize: Quantize,
    width: int = 1,
    passes: int = 5,
) -> tuple[Float[Tensor, "rows columns"], Int[Tensor, "rows codes"]]:
    """Go over the blocks again: each is rounded from where the proxy loss is least, given all others.

    That point is What_b - (What - W) H_:b H_bb^-1. A block of a row keeps its codes unless the new ones lower the
    loss, so that no pass raises it: the nearest vector in a plane lattice need not be the best one under H_bb.
    """
    rounded, codes = rounded.clone(), codes.clone()
    columns, per = weight.shape[1], codes.shape[1] * width // weight.shape[1]
    for _ in range(passes):
        changed = False
        for start in range(0, columns, max(_LAZY // width, 1) * width):
            stop = min(start + max(_LAZY // width, 1) * width, columns)
            slope = (rounded - weight) @ moment[:, start:stop]  # half the gradient in these columns
            for first in range(start, stop, width):
                block, local = slice(first, first + width), slice(first - start, first - start + width)
                curvature = moment[block, block]
                step = torch.linalg.solve(curvature, slope[:, local].T).T if width > 1 else slope[:, local] / curvature
                values, fresh = quantize(rounded[:, block] - step)
                change = values - rounded[:, block]
                gain = ((2 * slope[:, local] + change @ curvature) * change).sum(1)
                better = (gain < 0)[:, None]
                change = torch.where(better, change, 0.0)
                place = slice(first // width * per, (first // width + 1) * per)
                codes[:, place] = torch.where(better, fresh, codes[:, place])
                rounded[:, block] = torch.where(better, values, rounded[:, block])
                slope += change @ moment[block, start:stop]
                changed = changed or bool(better.any())
        if not changed:
            break
    return rounded, codes
