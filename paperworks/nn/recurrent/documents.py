"""Packed documents laid out one a row, for mixers that cannot begin anew in the middle of a row."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Documents:
    """The documents of packed rows, or the parts of them that one call brings.

    Attributes:
        count: how many there are; width: places that the longest needs, its offset included.
        last: (batch,) the last document of each row.
        opens: (count,) whether it begins here; False where it goes on from an earlier call.
        row: (count,) the row of the batch it stands in.
    """

    def __init__(self, begins: Bool[Tensor, "batch time"], offset: Int[Tensor, " batch"] | None = None) -> None:
        """Read where documents begin. `offset`: free places before those that only go on, by row of the batch."""
        self.shape = begins.shape
        batch, time = begins.shape
        flags = begins.clone()
        flags[:, 0] = True
        self._document = flags.flatten().cumsum(0) - 1
        starts = flags.flatten().nonzero().squeeze(-1)
        self.row = starts // time
        self.opens = begins.flatten()[starts]
        self._place = torch.arange(batch * time, device=begins.device) - starts[self._document]
        if offset is not None:
            self._place = self._place + offset[self.row].masked_fill(self.opens, 0)[self._document]
        self.count, self.width = len(starts), int(self._place.max()) + 1
        self.last = self._document.view(batch, time)[:, -1]

    def spread(self, x: Tensor, width: int | None = None) -> Tensor:
        """Lay (batch, time, ...) out as (count, width, ...), zeros where a document has no token."""
        laid = x.new_zeros(self.count, self.width if width is None else width, *x.shape[2:])
        return laid.index_put((self._document, self._place), x.flatten(0, 1))

    def gather(self, laid: Tensor) -> Tensor:
        """Bring (count, width, ...) back to (batch, time, ...)."""
        out: Tensor = laid[self._document, self._place].unflatten(0, self.shape)
        return out

    def filled(self, width: int | None = None) -> Bool[Tensor, "count width"]:
        """Which places hold a token."""
        return self.spread(torch.ones(self.shape, dtype=torch.bool, device=self.row.device), width)
