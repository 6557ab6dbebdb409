"""Mixtures of experts as a feed-forward part: each token is worked on by a few of many (Shazeer et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.core import processes
from paperworks.nn import auxiliary
from paperworks.nn.feedforward.experts.routers import Router, Routing, TopKRouter
from paperworks.nn.feedforward.mlp import Feedforward
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
            first choices before second ones and then in order; for those beyond, that expert gives nothing. Inside
            `processes.one_batch()` the tokens are those of all processes, in the order of the processes.
        capacity_evaluation: the factor outside training (Switch: 2.0); None means the same.
        capacity_tokens: instead of a factor, how many tokens of each sequence of a call an expert takes, in order
            (Hugging Face's Switch counts so). None loses no token.
        shared: experts that all tokens go to, with weight 1.
    """

    expert: Feedforward
    count: int
    top: int = 2
    router: Router = TopKRouter()  # noqa: RUF009  (frozen)
    capacity: float | None = None
    capacity_evaluation: float | None = None
    shared: int = 0
    capacity_tokens: int | None = None

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
        if self.capacity_tokens is not None:
            if self.capacity_tokens < 1:
                raise ValueError(
                    f"Experts.capacity_tokens must be at least 1, or None to lose no token, got {self.capacity_tokens}"
                )
            if self.capacity is not None:
                raise ValueError(
                    "Experts has both capacity and capacity_tokens; give one: a factor, or a count of tokens"
                )
        if isinstance(self.expert, Experts):
            raise ValueError("Experts.expert is itself a mixture of experts; nest them by a router over groups instead")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return ExpertsModule(dim, self)


class ExpertsModule(nn.Module):
    """The module of `Experts`. Taps: `choice` (tokens, top), the experts chosen; `weight` (tokens, top).

    `experts.i` are plain feed-forward modules, so that adapters and weight formats see their linear layers.
    """

    def __init__(self, dim: int, spec: Experts) -> None:
        super().__init__()
        self.spec = spec
        self.router = spec.router.build(dim, spec.count, spec.top)
        self.experts = self._build_experts(dim)
        self.shared = nn.ModuleList([spec.expert.build(dim) for _ in range(spec.shared)])
        self.choice = Tap()
        self.weight = Tap()

    def _build_experts(self, dim: int) -> nn.ModuleList:
        return nn.ModuleList([self.spec.expert.build(dim) for _ in range(self.spec.count)])

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Apply to each position the experts that its token chooses."""
        flat = x.flatten(0, -2)
        real = auxiliary.real_tokens(flat.shape[0])
        routing: Routing = self.router(flat, real)
        experts, weights = self.choice(routing.experts), self.weight(routing.weights)
        factor = self._factor()
        if factor is not None:
            weights = weights * served(experts, self.spec.count, factor)
        elif self.spec.capacity_tokens is not None:
            weights = weights * served_of_each(experts, self.spec.count, self.spec.capacity_tokens, x.shape[-2])
        out = self._dispatch(flat, experts, weights)
        for expert in self.shared:
            out = out + expert(flat)
        return out.view_as(x)

    def _factor(self) -> float | None:
        spec = self.spec
        if not self.training and spec.capacity_evaluation is not None:
            return spec.capacity_evaluation
        return spec.capacity

    def _dispatch(self, flat: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sort choices by expert, let each expert work on its own in one piece, and add the results up by token."""
        top = experts.shape[1]
        chosen, factors = experts.flatten(), weights.flatten()
        kept = factors != 0  # beyond capacity, or not taken
        order = torch.argsort(torch.where(kept, chosen, self.spec.count), stable=True)
        counts = torch.bincount(chosen[kept], minlength=self.spec.count).cpu()  # where tensors are cut, not computed
        order = order[: int(counts.sum())]
        tokens = order // top
        scaled = self._work(flat[tokens], counts) * factors[order, None]
        return torch.zeros_like(flat).index_add(0, tokens, scaled.to(flat.dtype))

    def _work(self, inputs: Tensor, counts: Tensor) -> Tensor:
        """The outputs for inputs sorted by expert, `counts` of them for each."""
        experts = self._experts_here()
        parts = inputs.split(counts.tolist())
        outputs = [
            expert(part) if len(part) else self._unused(expert, part)
            for expert, part in zip(experts, parts, strict=True)
        ]
        return torch.cat(outputs)

    def _experts_here(self) -> Sequence[nn.Module]:
        return list(self.experts)

    def _unused(self, expert: nn.Module, part: Tensor) -> Tensor:
        """Output of an expert without tokens; in training a sum that gives its parameters gradients of zero."""
        return self._nothing(expert, part) if self.training and torch.is_grad_enabled() else part

    def _nothing(self, expert: nn.Module, part: Tensor) -> Tensor:
        total: Any = sum((p.sum() * 0 for p in expert.parameters() if p.requires_grad), start=part.new_zeros(()))
        out: Tensor = part + total
        return out


def served(experts: Int[Tensor, "tokens top"], count: int, factor: float) -> Bool[Tensor, "tokens top"]:
    """Where a choice is within the capacity of its expert, floor(factor * tokens * top / count)."""
    tokens, top = experts.shape
    if not processes.is_spread():
        return within_capacity(experts, count, _capacity(factor, tokens, top, count))
    choices = torch.stack([torch.bincount(column, minlength=count) for column in experts.unbind(1)])
    everywhere = processes.gathered(choices)  # (processes, top, count)
    capacity = _capacity(factor, int(everywhere.sum()) // top, top, count)
    others = everywhere.clone()
    others[processes.rank()] = 0
    # a choice comes after all processes' better choices, and after earlier processes' equally good ones
    before = others.sum(0).cumsum(0) - others.sum(0) + others[: processes.rank()].sum(0)
    return within_capacity(experts, count, capacity, before)


def served_of_each(
    experts: Int[Tensor, "tokens top"], count: int, capacity: int, time: int
) -> Bool[Tensor, "tokens top"]:
    """Where a choice is among the first `capacity` of its expert in its own sequence of `time` tokens."""
    return torch.cat([within_capacity(own, count, capacity) for own in experts.split(time)])


def _capacity(factor: float, tokens: int, top: int, count: int) -> int:
    return math.floor(factor * tokens * top / count)


def within_capacity(
    experts: Int[Tensor, "tokens top"],
    count: int,
    capacity: int,
    before: Int[Tensor, "top count"] | None = None,
) -> Bool[Tensor, "tokens top"]:
    """Where a choice is among the first `capacity` of its expert.

    All tokens' first choices come before any second choice (GShard), and within a choice tokens come in order. `before`
    counts what comes before from elsewhere: for each choice, first or second or so, and each expert.
    """
    by_choice = experts.t().flatten()
    place = torch.nn.functional.one_hot(by_choice, count).cumsum(0).gather(1, by_choice[:, None]).squeeze(1)
    place = place.view(experts.shape[1], -1)
    if before is not None:
        place = place + before.gather(1, experts.t())
    return (place <= capacity).t()
