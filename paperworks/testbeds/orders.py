"""Sequences read in any order: the batches of a sigma-GPT (Pannatier et al. 2024, arXiv:2404.09562)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor


def random_orders(
    rows: int, length: int, draws: torch.Generator | None = None, *, fraction: float = 1.0
) -> Int[Tensor, "rows length"]:
    """Orders of the positions 0 ... length - 1; each begins with 0, the start, which is given and never asked.

    A share of `fraction` of the rows, each drawn by chance, is random; the others go from left to right.
    Raises ValueError for a length below 2 or a fraction outside [0, 1].
    """
    if length < 2:
        raise ValueError(f"an order needs a start and something after it: length 2 or more, got {length}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    keys = torch.rand(rows, length - 1, generator=draws, dtype=torch.float64)
    keys[torch.rand(rows, generator=draws) >= fraction] = torch.arange(length - 1, dtype=torch.float64)
    return torch.nn.functional.pad(keys.argsort(1) + 1, (1, 0))


def in_order(
    sequences: Int[Tensor, "rows length"], orders: Int[Tensor, "rows length"]
) -> dict[str, Int[Tensor, "rows time"]]:
    """The batch in which each token is asked for the next one of its order; time is length - 1.

    Position t of the batch holds the token at orders[t] and is asked for the one at orders[t + 1].
    Raises ValueError unless each row of `orders` is a permutation.
    """
    if sequences.shape != orders.shape or sequences.dim() != 2:
        raise ValueError(
            f"sequences {tuple(sequences.shape)} and orders {tuple(orders.shape)} must be one (rows, length)"
        )
    if not torch.equal(orders.sort(1).values, torch.arange(orders.shape[1], device=orders.device).expand_as(orders)):
        raise ValueError(f"each row of orders must hold every position from 0 to {orders.shape[1] - 1} once")
    shuffled = sequences.gather(1, orders)
    return {
        "tokens": shuffled[:, :-1],
        "targets": shuffled[:, 1:],
        "positions": orders[:, :-1],
        "target_positions": orders[:, 1:],
    }


class AnyOrder:
    """Batches of sequences, each in a random order; the same ones in every run, whatever was drawn before.

    Args:
        sequences: what gives int64 (rows, length), all of one length, again at each passage; position 0 is the start.
        fraction: the share of rows in random order, or a function of the number of the batch: a curriculum, which
            the paper begins from left to right for text.
        seed: decides the orders, with the epoch.
    """

    def __init__(
        self, sequences: Iterable[Tensor], *, fraction: float | Callable[[int], float] = 1.0, seed: int = 0
    ) -> None:
        self.sequences, self.fraction, self.seed = sequences, fraction, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which passage comes next; `train.fit` does."""
        self.epoch = epoch
        inner = getattr(self.sequences, "set_epoch", None)
        if callable(inner):
            inner(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)  # a prime keeps pairs apart
        for number, rows in enumerate(self.sequences):
            share = self.fraction(number) if callable(self.fraction) else self.fraction
            yield in_order(rows, random_orders(rows.shape[0], rows.shape[1], draws, fraction=share))
