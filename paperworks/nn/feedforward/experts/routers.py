"""How tokens choose their experts: noisy top-k (Shazeer et al. 2017), Switch's and Mixtral's; and their losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core import processes
from paperworks.core.initialization import Context
from paperworks.core.spec import Spec
from paperworks.nn import auxiliary


class Routing(NamedTuple):
    """Which experts each token goes to, best first, and what their outputs are multiplied by."""

    experts: Int[Tensor, "tokens top"]
    weights: Float[Tensor, "tokens top"]


@dataclass(frozen=True, kw_only=True)
class Router(Spec):
    """What chooses experts: `build(dim, count, top)` gives a module (tokens, dim) -> Routing."""

    def build(self, dim: int, count: int, top: int) -> nn.Module:
        """The module that chooses `top` of `count` experts."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


def balance_loss(
    probabilities: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens top"],
    real: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Switch's N * sum_i f_i P_i: 1 when routing is uniform, N when all tokens surely go to one expert.

    f_i is the share of choices that fell on expert i (no gradient), P_i its mean probability. Tokens that are not
    `real` (padding) do not count.
    """
    count = probabilities.shape[1]
    if real is not None:
        probabilities, chosen = probabilities[real], chosen[real]
    choices = torch.bincount(chosen.flatten(), minlength=count).to(probabilities.dtype)
    choices, sums = processes.summed(torch.stack((choices, probabilities.sum(0)))).unbind()
    made = choices.sum().clamp(min=1)
    return count * (choices / made * sums / (made / chosen.shape[1])).sum()


def z_loss(logits: Float[Tensor, "tokens experts"], real: Bool[Tensor, " tokens"] | None = None) -> Float[Tensor, ""]:
    """mean(logsumexp(logits)^2), which keeps a router's logits small (Zoph et al. 2022, arXiv:2202.08906)."""
    logits = logits if real is None else logits[real]
    squares = logits.logsumexp(-1).square().sum()
    total, tokens = processes.summed(torch.stack((squares, torch.full_like(squares, len(logits))))).unbind()
    return total / tokens.clamp(min=1)


def squared_variation(values: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """CV^2 = variance / mean^2 (0 for a single value), the biased variance."""
    return values.var(unbiased=False) / (values.mean().square() + 1e-10)


@dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """logits = W x (float32); the k largest; weights from a softmax over all experts, or over the chosen ones.

    Attributes:
        softmax: "before" choosing, over all experts (Switch, GShard), or "after", over the chosen (Mixtral).
        renormalize: with "before", whether weights are divided by their sum, which makes it the same as "after". With
            one expert a token the weight would always be 1 and the router would learn nothing: refused there.
        jitter: in training, inputs are multiplied by uniform(1 - jitter, 1 + jitter) (Switch: 0.01).
        balance: weight of `balance_loss` (Switch: 0.01).
        z: weight of `z_loss` (ST-MoE: 0.001).
        second: "top" takes the second expert always; "random" takes it with probability min(1, 2 * its weight), as
            GShard does in training (Lepikhin et al. 2020, arXiv:2006.16668).
    """

    softmax: Literal["before", "after"] = "after"
    renormalize: bool = False
    jitter: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    second: Literal["top", "random"] = "top"

    def validate(self) -> None:
        """Check the weights."""
        for name in ("jitter", "balance", "z"):
            if getattr(self, name) < 0:
                raise ValueError(f"TopKRouter.{name} must be at least 0, got {getattr(self, name)}")
        if self.jitter >= 1:
            raise ValueError(f"TopKRouter.jitter must be below 1, got {self.jitter}")

    def build(self, dim: int, count: int, top: int) -> nn.Module:
        """The module that chooses `top` of `count` experts."""
        if top == 1 and (self.softmax == "after" or self.renormalize):
            raise ValueError(
                "with one expert a token a softmax over the chosen is always 1, and the router gets no gradient: use "
                "TopKRouter(softmax='before') without renormalize, as Switch does"
            )
        return TopKRouterModule(dim, count, top, self)


class TopKRouterModule(nn.Module):
    """The module of `TopKRouter`."""

    def __init__(self, dim: int, count: int, top: int, spec: TopKRouter) -> None:
        super().__init__()
        self.spec, self.top = spec, top
        self.logits = nn.Linear(dim, count, bias=False)

    def forward(self, x: Float[Tensor, "tokens dim"], real: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Choose; hand the balance and z losses to `nn.auxiliary`."""
        spec = self.spec
        if self.training and spec.jitter:
            x = x * torch.empty_like(x).uniform_(1 - spec.jitter, 1 + spec.jitter)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):  # selective precision: the choice is made in float32
            logits = F.linear(x.to(wide), self.logits.weight.to(wide))
            probabilities = logits.softmax(-1)
            best, experts = (logits if spec.softmax == "after" else probabilities).topk(self.top, -1)
        weights = best.softmax(-1) if spec.softmax == "after" else best
        if spec.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if spec.second == "random" and self.training and self.top > 1:
            kept = torch.rand_like(weights[:, 1:]) < 2 * weights[:, 1:]
            weights = torch.cat((weights[:, :1], weights[:, 1:] * kept), 1)
        if spec.balance:
            auxiliary.add(spec.balance * balance_loss(probabilities, experts, real), "balance")
        if spec.z:
            auxiliary.add(spec.z * z_loss(logits, real), "router z")
        return Routing(experts, weights.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, Section 2.1 and Appendix A).

    H = W_g x + N(0, 1) softplus(W_noise x); softmax over the k largest. Noise in training only; both matrices begin at
    zero, so that all experts begin with about equal load. Losses: `importance` * CV(sum of weights)^2 and `load` *
    CV(smooth load)^2, where a token's load on an expert is the probability that it would be chosen with fresh noise.
    """

    importance: float = 0.1
    load: float = 0.1

    def validate(self) -> None:
        """Check the weights."""
        for name in ("importance", "load"):
            if getattr(self, name) < 0:
                raise ValueError(f"NoisyTopKRouter.{name} must be at least 0, got {getattr(self, name)}")

    def build(self, dim: int, count: int, top: int) -> nn.Module:
        """The module that chooses `top` of `count` experts."""
        return NoisyTopKRouterModule(dim, count, top, self)


class NoisyTopKRouterModule(nn.Module):
    """The module of `NoisyTopKRouter`."""

    def __init__(self, dim: int, count: int, top: int, spec: NoisyTopKRouter) -> None:
        super().__init__()
        self.spec, self.top = spec, top
        self.logits = nn.Linear(dim, count, bias=False)
        self.noise = nn.Linear(dim, count, bias=False)
        self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Set both matrices to zero, as the paper does."""
        self.logits.weight.zero_()
        self.noise.weight.zero_()

    def forward(self, x: Float[Tensor, "tokens dim"], real: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Choose; hand the importance and load losses to `nn.auxiliary` in training."""
        clean = self.logits(x)
        if not self.training:
            best, experts = clean.topk(self.top, -1)
            return Routing(experts, best.softmax(-1))
        spread = F.softplus(self.noise(x))
        noisy = clean + torch.randn_like(clean) * spread
        best, experts = noisy.topk(self.top, -1)
        weights = best.softmax(-1)
        counted = slice(None) if real is None else real
        if self.spec.importance:
            given = torch.zeros_like(noisy).scatter(1, experts, weights)[counted].sum(0)
            auxiliary.add(self.spec.importance * squared_variation(processes.summed(given)), "importance")
        if self.spec.load and self.top < clean.shape[1]:
            load = smooth_load(clean, spread, noisy, self.top)[counted].sum(0)
            auxiliary.add(self.spec.load * squared_variation(processes.summed(load)), "load")
        return Routing(experts, weights)


def smooth_load(
    clean: Float[Tensor, "tokens experts"],
    spread: Float[Tensor, "tokens experts"],
    noisy: Float[Tensor, "tokens experts"],
    top: int,
) -> Float[Tensor, "tokens experts"]:
    """P(x, i): the probability that expert i is among the `top`, its own noise drawn again, the others' kept.

    Phi((clean_i - t_i) / spread_i), t_i the `top`-th largest of the other experts' noisy logits.
    """
    largest = noisy.topk(top + 1, -1).values
    # without expert i, the k-th largest is the (k+1)-th of all where i is among the k largest, else the k-th
    inside = noisy >= largest[:, top - 1 : top]
    threshold = torch.where(inside, largest[:, top : top + 1], largest[:, top - 1 : top])
    out: Tensor = torch.special.ndtr((clean - threshold) / spread)
    return out
