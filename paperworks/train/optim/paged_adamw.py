"""AdamW with its state on the host, in pages that visit the device (QLoRA, Dettmers et al. 2023, Section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.adamw import AdamW
from paperworks.train.optim.optimizer import ParameterGroups

if TYPE_CHECKING:
    import torch

PAGE = 2**20  # numbers of each average in a page: 8 MiB in float32, large enough for the bus to run at its full rate
ALIGNED = 64  # vectorized loops treat the end of a tensor apart: pages end where whole vectors do


@dataclass(frozen=True, kw_only=True)
class PagedAdamW(AdamW):
    """AdamW, bit for bit, with at most `budget` bytes of its state on the device.

    page: numbers of each average that are moved at a time, a multiple of 64.
    """

    budget: int
    page: int = PAGE

    def validate(self) -> None:
        """Raise `ValueError` for a field out of its range."""
        super().validate()
        self._require("budget", self.budget > 0, "above 0 bytes")
        valid = self.page >= 1 and self.page % ALIGNED == 0
        self._require("page", valid, f"a positive multiple of {ALIGNED} numbers")

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build it. Raises `ValueError` when the budget does not hold one page."""
        from paperworks.train.optim.paging import PagedAdamWOptimizer

        return PagedAdamWOptimizer(
            groups,
            budget=self.budget,
            page=self.page,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
