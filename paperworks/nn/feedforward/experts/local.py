"""Adaptive mixtures of local experts: a gate and experts that compete for patterns (Jacobs et al. 1991)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.spec import Spec


class Opinions(NamedTuple):
    """What the experts say of each pattern, and the gate's logits: p = softmax(logits)."""

    outputs: Float[Tensor, "batch experts outputs"]
    logits: Float[Tensor, "batch experts"]

    def blended(self) -> Float[Tensor, "batch outputs"]:
        """sum_i p_i o_i, the system's output."""
        return torch.einsum("be,beo->bo", self.logits.softmax(-1), self.outputs)


def blended_error(target: Float[Tensor, "batch outputs"], opinions: Opinions) -> Float[Tensor, " batch"]:
    """E = ||d - sum_i p_i o_i||^2 (Equation 1): experts cooperate, each corrects what the others leave."""
    _check(target, opinions)
    return (target - opinions.blended()).square().sum(-1)


def expected_error(target: Float[Tensor, "batch outputs"], opinions: Opinions) -> Float[Tensor, " batch"]:
    """E = sum_i p_i ||d - o_i||^2 (Equation 2): each expert answers for the whole, in proportion to p_i."""
    return (opinions.logits.softmax(-1) * _distances(target, opinions)).sum(-1)


def competitive_error(target: Float[Tensor, "batch outputs"], opinions: Opinions) -> Float[Tensor, " batch"]:
    """E = -log sum_i p_i exp(-||d - o_i||^2 / 2) (Equation 3): experts compete, the best learns fastest.

    dE/do_i = -h_i (d - o_i) and dE/dlogit_i = p_i - h_i, with h of `posterior`. E + (outputs / 2) log(2 pi) is the
    negative log-likelihood of a mixture of unit Gaussians. With one expert E is half the squared error.
    """
    return -_joint(target, opinions).logsumexp(-1)


def posterior(target: Float[Tensor, "batch outputs"], opinions: Opinions) -> Float[Tensor, "batch experts"]:
    """h_i = p_i exp(-||d - o_i||^2 / 2) / sum_j (the same): which expert the target came from."""
    return _joint(target, opinions).softmax(-1)


ERRORS: dict[str, Callable[[Tensor, Opinions], Tensor]] = {
    "blended": blended_error,
    "expected": expected_error,
    "competitive": competitive_error,
}


def _check(target: Tensor, opinions: Opinions) -> None:
    batch, _, outputs = opinions.outputs.shape
    if target.shape != (batch, outputs):
        raise ValueError(
            f"the target has shape {tuple(target.shape)}; the experts' opinions {tuple(opinions.outputs.shape)} "
            f"(batch, experts, outputs) need ({batch}, {outputs})"
        )


def _distances(target: Tensor, opinions: Opinions) -> Tensor:
    _check(target, opinions)
    return (target[:, None] - opinions.outputs).square().sum(-1)


def _joint(target: Tensor, opinions: Opinions) -> Tensor:
    return opinions.logits.log_softmax(-1) - _distances(target, opinions) / 2


@dataclass(frozen=True, kw_only=True)
class LocalExperts(Spec):
    """y = sum_i p_i(x) o_i(x) with p = softmax(gate(x)), a linear gate; every expert sees every pattern.

    Attributes:
        count: experts there are.
        hidden: None for linear experts; else the tanh units of one hidden layer.
        error: how the experts learn: "competitive" (Equation 3), or "blended" or "expected" (Equations 1 and 2), which
            the paper compares it with.
    """

    count: int
    hidden: int | None = None
    error: str = "competitive"

    def validate(self) -> None:
        """Check the sizes and the error's name."""
        if self.count < 1:
            raise ValueError(f"LocalExperts.count must be at least 1, got {self.count}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"LocalExperts.hidden must be at least 1, or None for linear experts, got {self.hidden}")
        if self.error not in ERRORS:
            raise ValueError(f"LocalExperts.error must be one of {', '.join(ERRORS)}, got {self.error!r}")

    def build(self, inputs: int, outputs: int) -> LocalExpertsModule:
        """The module (batch, inputs) -> (batch, outputs), its experts drawn apart so that they can differ."""
        for name, size in (("inputs", inputs), ("outputs", outputs)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        return LocalExpertsModule(self, inputs, outputs)


class LocalExpertsModule(nn.Module):
    """The module of `LocalExperts`."""

    def __init__(self, spec: LocalExperts, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(inputs, spec.count)
        self.experts = nn.ModuleList([_expert(inputs, spec.hidden, outputs) for _ in range(spec.count)])

    def opinions(self, x: Float[Tensor, "batch inputs"]) -> Opinions:
        """Each expert's output and the gate's logits."""
        return Opinions(torch.stack([expert(x) for expert in self.experts], 1), self.gate(x))

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """The blend of all experts."""
        return self.opinions(x).blended()

    def error(
        self, x: Float[Tensor, "batch inputs"], target: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """The error of each pattern, the one the spec names."""
        return ERRORS[self.spec.error](target, self.opinions(x))

    def gate_entropy(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, ""]:
        """The gate's mean entropy in nats: 0 when each pattern has one expert, log(count) when all share it."""
        shares = self.gate(x).log_softmax(-1)
        out: Tensor = -(shares.exp() * shares).sum(-1).mean()
        return out


def _expert(inputs: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
