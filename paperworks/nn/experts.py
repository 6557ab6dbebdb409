"""Mixtures of experts as a feed-forward part: each token is worked on by a few of many (Shazeer et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.nn import auxiliary
from paperworks.nn.feedforward import Feedforward
from paperworks.nn.routers import Router, Routing, TopKRouter
from paperworks.nn.tap import Tap


@dataclass(frozen=True, kw_only=True)
class Experts(Feedforward):
    """y = sum over the chosen experts of weight_i * expert_i(x), plus shared experts that every token goes to.

    Attributes:
        expert: what each expert is: any feed-forward part.
        count: experts there are.
        top: experts a token goes to.
        router: what chooses them.
        capacity: None loses no token. A factor c lets an expert take floor(c * tokens * top / count) tokens of a call,
            first choices before second ones and then in order; for those beyond, that expert gives nothing.
        capacity_evaluation: the factor outside training (Switch: 2.0); None means the same.
        shared: experts that all tokens go to, with weight 1.
    """

    expert: Feedforward
    count: int
    top: int = 2
    router: Router = TopKRouter()  # noqa: RUF009  (frozen)
    capacity: float | None = None
    capacity_evaluation: float | None = None
    shared: int = 0

    def validate(self) -> None:
        """Check that there are enough experts."""
        if self.count < 1:
            raise ValueError(f"Experts.count must be at least 1, got {self.count}")
        if not 1 <= self.top <= self.count:
            raise ValueError(f"Experts.top must be between 1 and count ({self.count}), got {self.top}")
        if self.shared < 0:
            raise ValueError(f"Experts.shared must be at least 0, got {self.shared}")
        for name in ("capacity", "capacity_evaluation"):
            factor = getattr(self, name)
            if factor is not None and factor <= 0:
                raise ValueError(f"Experts.{name} must be positive, or None to lose no token, got {factor}")
        if self.capacity is None and self.capacity_evaluation is not None:
            raise ValueError("Experts.capacity_evaluation needs a capacity in training too")
        if isinstance(self.expert, Experts):
            raise ValueError("Experts.expert is itself a mixture of experts; nest them by a router over groups instead")

    def build(self, dim: int) -> nn.Module:
        """Return the module for vectors of `dim` numbers."""
        return ExpertsModule(dim, self)


class ExpertsModule(nn.Module):
    """The module of `Experts`. Taps: `choice` (tokens, top), the experts chosen; `weight` (tokens, top).

    `experts.i` are plain feed-forward modules, so that adapters and weight formats see their linear layers.
    """

    def __init__(self, dim: int, spec: Experts) -> None:
        super().__init__()
        self.spec = spec
        self.router = spec.router.build(dim, spec.count, spec.top)
        self.experts = nn.ModuleList([spec.expert.build(dim) for _ in range(spec.count)])
        self.shared = nn.ModuleList([spec.expert.build(dim) for _ in range(spec.shared)])
        self.choice = Tap()
        self.weight = Tap()

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Apply to each position the experts that its token chooses."""
        flat = x.flatten(0, -2)
        real = auxiliary.real_tokens(flat.shape[0])
        routing: Routing = self.router(flat, real)
        experts, weights = self.choice(routing.experts), self.weight(routing.weights)
        capacity = self._capacity(len(flat))
        if capacity is not None:
            weights = weights * within_capacity(experts, self.spec.count, capacity)
        out = self._dispatch(flat, experts, weights)
        for expert in self.shared:
            out = out + expert(flat)
        return out.view_as(x)

    def _capacity(self, tokens: int) -> int | None:
        spec = self.spec
        factor = spec.capacity
        if not self.training and spec.capacity_evaluation is not None:
            factor = spec.capacity_evaluation
        return None if factor is None else math.floor(factor * tokens * spec.top / spec.count)

    def _dispatch(self, flat: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sort choices by expert, let each expert work on its own in one piece, and add the results up by token."""
        top = experts.shape[1]
        chosen, factors = experts.flatten(), weights.flatten()
        kept = factors != 0  # beyond capacity, or not taken
        order = torch.argsort(torch.where(kept, chosen, self.spec.count), stable=True)
        counts = torch.bincount(chosen[kept], minlength=self.spec.count).tolist()
        order = order[: sum(counts)]
        tokens = order // top
        inputs = flat[tokens]
        outputs = [
            expert(part) if len(part) else self._unused(expert, part)
            for expert, part in zip(self.experts, inputs.split(counts), strict=True)
        ]
        scaled = torch.cat(outputs) * factors[order, None]
        return torch.zeros_like(flat).index_add(0, tokens, scaled.to(flat.dtype))

    def _unused(self, expert: nn.Module, part: Tensor) -> Tensor:
        """Return nothing; in training in a way that gives the expert's parameters gradients of zero, not none."""
        if not self.training or not torch.is_grad_enabled():
            return part
        total: Any = sum((p.sum() * 0 for p in expert.parameters() if p.requires_grad), start=part.new_zeros(()))
        return part + total


def within_capacity(experts: Int[Tensor, "tokens top"], count: int, capacity: int) -> Bool[Tensor, "tokens top"]:
    """Return where a choice is among the first `capacity` of its expert.

    All tokens' first choices come before any second choice (GShard), and within a choice tokens come in order.
    """
    by_choice = experts.t().flatten()
    place = torch.nn.functional.one_hot(by_choice, count).cumsum(0).gather(1, by_choice[:, None]).squeeze(1)
    return (place <= capacity).view(experts.shape[1], -1).t()
