"""Rounding with error feedback: the loop that GPTQ, SparseGPT and QuIP's LDLQ share.

The layer's loss of replacing W by Q is tr((W - Q) H (W - Q)^T) with H the second moment of its inputs. Write H = R R^T
with R upper triangular, and M = R diag(R)^-1 with ones on its diagonal; the loss is then the sum over columns k of
R_kk^2 |column k of (W - Q) M|^2, and each term is as small as rounding lets it be when

    q_k = quantize(w_k + sum_(j < k) (w_j - q_j) M_jk).

This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) step for step: with its Cholesky factor H^-1 = U^T U, R = U^-1 and
1 / U_kk = R_kk. That both are the same was shown with QuIP (Chee et al. 2023, arXiv:2307.13304, Theorem 6). Nothing has
to be inverted, and the sums are collected by halves, so that nearly all the work is in large matrix products.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LEAF = 16  # columns done one by one before their errors are handed on in one product
MOST_DAMPING = 1.0  # of the mean of the diagonal: with more the data would not be heard


def feed_back(
    weight: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    quantize: Callable[[int, Float[Tensor, " rows"]], Float[Tensor, " rows"]],
    begin: Callable[[int, Float[Tensor, "width rows"]], None] | None = None,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """Q, column by column from the left, each corrected for the errors of those before it.

    Args:
        weight: W.
        factor: R, upper triangular with H = R R^T (see `upper_factor`).
        quantize: called as quantize(k, column) with the corrected column k; returns what is stored in its place.
        begin: called as begin(k, columns) for k = 0, block, 2 block ... before any of these columns is done, with
            all of them (transposed) as they would best be given the columns done: GPTQ's updated weights, and the
            place to choose the scales of a group, or a mask.
        block: how far apart `begin` is called; otherwise it changes only the order of sums.
    """
    ratios = (factor / factor.diagonal()).t().contiguous()  # M transposed: row k is what column k reads
    original = weight.t().contiguous()
    current, errors, result = original.clone(), torch.zeros_like(original), torch.empty_like(original)

    def hand_on(start: int, middle: int, stop: int) -> None:
        current[middle:stop].addmm_(ratios[middle:stop, start:middle], errors[start:middle])

    def solve(start: int, stop: int, unit: int, one: Callable[[int, int], None]) -> None:
        """Do the columns in units: half of them, then hand their errors on, then the other half."""
        if stop - start <= unit:
            one(start, stop)
            return
        middle = start + unit * (-(-(stop - start) // unit) // 2)
        solve(start, middle, unit, one)
        hand_on(start, middle, stop)
        solve(middle, stop, unit, one)

    def one_block(start: int, stop: int) -> None:
        if begin is not None:
            # what earlier columns ask of this one is met in part by the columns between: v M = correction
            between = ratios[start:stop, start:stop]
            correction = current[start:stop] - original[start:stop]
            met = torch.linalg.solve_triangular(between, correction, upper=False, unitriangular=True)
            begin(start, original[start:stop] + met)
        solve(start, stop, LEAF, one_by_one)

    def one_by_one(start: int, stop: int) -> None:
        for k in range(start, stop):
            column = current[k]
            if k > start:
                column = torch.addmv(column, errors[start:k].t(), ratios[k, start:k])
            rounded = quantize(k, column)
            result[k] = rounded
            torch.sub(original[k], rounded, out=errors[k])

    solve(0, len(original), block, one_block)
    return result.t().contiguous()


def upper_factor(
    second_moment: Float[Tensor, "columns columns"], damping: float = 0.01
) -> Float[Tensor, "columns columns"]:
    """R, upper triangular with R R^T = H + damping mean(diag H) I.

    Inputs that were always zero get a diagonal of 1, so that they are rounded for themselves. If the matrix is singular
    even so, it is damped ten times more until it is not, and a warning says by how much.

    Raises:
        ValueError: when no damping up to the mean of the diagonal makes it positive definite: it is no second moment.
    """
    moment = second_moment.clone()
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    added, amount = 0.0, damping
    while True:
        diagonal += (amount - added) * mean
        added = amount
        factor = upper_cholesky(moment)
        if factor is not None:
            if amount != damping:
                warnings.warn(
                    f"the second moment of the inputs is singular with damping {damping}: damped by {amount:g} of its "
                    "mean diagonal instead; more calibration tokens would make it regular",
                    stacklevel=2,
                )
            return factor
        if amount >= MOST_DAMPING:
            raise ValueError(
                "the second moment of the inputs is not positive semidefinite: gather it again, from finite inputs"
            )
        amount = min(max(10 * amount, 1e-4), MOST_DAMPING)


def upper_cholesky(moment: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"] | None:
    """R, upper triangular with R R^T = H, or None where H is not positive definite and finite."""
    lower, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    return None if bool(failed) or not bool(lower.isfinite().all()) else lower.flip(0, 1).contiguous()
