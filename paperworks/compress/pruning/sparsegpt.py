"""SparseGPT: pruning in one pass, each removed weight made up for by those not yet decided (arXiv:2301.00774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.feedback import feed_back, upper_factor
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.pruning.sparse import Sparse, smallest


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Sparse):
    """Prune column by column with GPTQ's error feedback (Frantar & Alistarh 2023, Algorithm 1).

    The mask is chosen `block` columns at a time, from the weights as updated so far, by w^2 / U_jj^2 with U the upper
    Cholesky factor of the inverse Hessian: what removing the weight costs when the columns to its right may adjust.

    Attributes:
        damping: share of the mean diagonal added to the second moment.
        block: columns whose mask is chosen together; with a pattern, the mask is chosen group by group instead.
    """

    damping: float = 0.01
    block: int = 128

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)

    def validate(self) -> None:
        """Check damping and block as well."""
        Sparse.validate(self)
        if self.damping < 0:
            raise ValueError(f"SparseGPT.damping must not be negative, got {self.damping}")
        if self.block < 1:
            raise ValueError(f"SparseGPT.block must be at least 1, got {self.block}")

    def choose(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """The corrected weight and what is kept of it."""
        moment = self.learned(statistics).required("second_moment").to(weight.device)
        dead = moment.diagonal() == 0
        weight = torch.where(dead, 0.0, weight)  # inputs that are always zero: their weights say nothing
        factor = upper_factor(moment, self.damping)
        cost = factor.diagonal().square()  # 1 / U_jj^2
        pruned = torch.zeros_like(weight.t(), dtype=torch.bool)  # by column

        def begin(start: int, columns: Float[Tensor, "width rows"]) -> None:
            stop = start + len(columns)
            scores = columns.square() * cost[start:stop, None]
            if self.pattern is None:
                # one more than the share: the score at that index is the threshold, and pruned itself
                count = min(int(scores.numel() * self.sparsity) + 1, scores.numel()) if self.sparsity else 0
                pruned[start:stop] = smallest(scores.reshape(1, -1), count).view(scores.shape)
            else:
                pruned[start:stop] = smallest(scores.t().contiguous(), self.zeros_of[0]).t()

        def prune(k: int, column: Float[Tensor, " rows"]) -> Tensor:
            return column.masked_fill(pruned[k], 0.0)

        step = self.block if self.pattern is None else self.zeros_of[1]
        result = feed_back(weight, factor, prune, begin, step)
        return result, ~pruned.t().contiguous()

    def kept(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix of this shape are kept."""
        if self.pattern is not None or not self.sparsity:
            return super().kept(shape)
        rows, columns = shape
        widths = [min(self.block, columns - start) for start in range(0, columns, self.block)]
        return sum(rows * width - min(int(rows * width * self.sparsity) + 1, rows * width) for width in widths)
