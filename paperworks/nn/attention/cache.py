"""The cache of attention: keys and values of what came before."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.nn.placement import MixerCache


class KeyValueCache(MixerCache):
    """Keys (already rotated) and values by slot: token t stands in slot t, or in t mod capacity when rolling.

    Keys and values may differ in size; what a mixer stores as "keys" is its own affair (MLA: the compressed latent).
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        rolling: bool,
        dtype: torch.dtype,
        device: torch.device,
        value_dim: int | None = None,
    ) -> None:
        self.keys = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        size = head_dim if value_dim is None else value_dim
        self.values = torch.zeros(batch, heads, capacity, size, dtype=dtype, device=device)
        self.capacity, self.rolling = capacity, rolling

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def bytes(self) -> int:
        """Memory held, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens; what is stored next takes their slots."""
        if self.rolling:
            super().truncate(length)

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, heads, time, size); return all that the new tokens may look at.

        In the order of `visible_order`. A chunk in a rolling cache sees the old slots and the chunk itself, side by
        side, since storing it first would overwrite tokens that its own first tokens still see.
        """
        time = keys.shape[2]
        if not self.rolling:
            end = start + time
            self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
            return self.keys[:, :, :end], self.values[:, :, :end]
        held = min(start, self.capacity)
        if time == 1:
            slot = start % self.capacity
            self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1] = keys, values
            held = min(start + 1, self.capacity)
            return self.keys[:, :, :held], self.values[:, :, :held]
        seen = torch.cat((self.keys[:, :, :held], keys), 2), torch.cat((self.values[:, :, :held], values), 2)
        kept = min(time, self.capacity)
        slots = torch.arange(start + time - kept, start + time, device=keys.device) % self.capacity
        self.keys[:, :, slots], self.values[:, :, slots] = keys[:, :, -kept:], values[:, :, -kept:]
        return seen

    def visible_order(self, start: int, time: int, device: torch.device) -> Int[Tensor, " slots"]:
        """The token, counted from the first of the sequence, that each key of `extend` belongs to."""
        end = start + time
        if not self.rolling:
            return torch.arange(end, device=device)
        last = end if time == 1 else start  # a single token is stored before it looks
        slots = torch.arange(min(last, self.capacity), device=device)
        order = slots + (last - 1 - slots).div(self.capacity, rounding_mode="floor") * self.capacity
        return order if time == 1 else torch.cat((order, torch.arange(start, end, device=device)))
