"""Activations with planted truth: a direction for truth, one that negation turns round, one for polarity, topics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Planted:
    """Activations made of known directions, with their truth, polarity and data set."""

    states: Float[Tensor, "n dim"]
    true: Bool[Tensor, " n"]
    affirmative: Bool[Tensor, " n"]
    topic: Int[Tensor, " n"]
    general: Float[Tensor, " dim"]
    polar: Float[Tensor, " dim"]

    def __getitem__(self, rows: Tensor) -> Planted:
        parts = (self.states[rows], self.true[rows], self.affirmative[rows], self.topic[rows])
        return Planted(*parts, self.general, self.polar)

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """The data set of each row: a topic in one polarity."""
        return 2 * self.topic + self.affirmative


def planted(seed: int, per_cell: int, noise: float = 0.3, topics: int = 6, dim: int = 64) -> Planted:
    """Draw a = tau t_G + tau p t_P + p (polarity) + topic + noise, with |t_P| = 1.2, |polarity| = 2, |topic| = 3."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    general, polar, polarity = torch.linalg.qr(normal(dim, 3)).Q.T * torch.tensor([[1.0], [1.2], [2.0]])
    topic, sign, tau = torch.cartesian_prod(
        torch.arange(topics), torch.tensor([1, -1]), torch.tensor([1, -1]).repeat_interleave(per_cell)
    ).T
    offsets = 3 * normalize(normal(topics, dim), dim=1)
    states = offsets[topic] + noise * normal(len(tau), dim)
    states = states + tau[:, None] * general + (tau * sign)[:, None] * polar + sign[:, None] * polarity
    return Planted(states, tau > 0, sign > 0, topic, general, polar)
