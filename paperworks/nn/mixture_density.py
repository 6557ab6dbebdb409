"""Densities as outputs: a mixture of bivariate Gaussians and a bit (Bishop 1994; Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.spec import Spec

# tanh(8) is the last correlation but a few that float32 tells from 1; beyond it 1 - rho^2 would be rounding alone.
MOST_CORRELATED = 8.0


@dataclass(frozen=True, kw_only=True)
class StrokeMixture(Spec):
    """6 K + 1 numbers a step: K Gaussians over where the pen goes, and the odds that it is lifted there.

    p(x, e) = sum_k pi_k N(x | mu_k, sigma_k, rho_k) q^e (1 - q)^(1 - e), with pi = softmax, sigma = exp, rho = tanh and
    q = sigmoid of the outputs (Section 4.1; 121 numbers with the paper's 20 components).
    """

    components: int = 20

    def validate(self) -> None:
        """Check that there is a component."""
        if self.components < 1:
            raise ValueError(f"StrokeMixture.components must be at least 1, got {self.components}")

    def build(self, dim: int) -> nn.Linear:
        """The layer whose output `StrokeDensity` reads."""
        return nn.Linear(dim, 6 * self.components + 1)


class StrokeDensity:
    """The density that the outputs (..., 6 K + 1) stand for: weights, means, spreads, correlations, then the bit.

    bias sharpens it (Section 5.4): sigma = exp(s - bias), pi = softmax(p (1 + bias)); without end, only the mean of the
    heaviest component is left. Raises ValueError for another number of outputs, or a bias below 0.
    """

    def __init__(self, outputs: Float[Tensor, "*rows numbers"], bias: float = 0.0) -> None:
        if outputs.shape[-1] % 6 != 1 or outputs.shape[-1] < 7:
            raise ValueError(f"outputs must have 6 K + 1 numbers for K components, got {outputs.shape[-1]}")
        if bias < 0:
            raise ValueError(f"bias must be at least 0 (0 is the density as trained), got {bias}")
        count = outputs.shape[-1] // 6
        weights, means, spreads, correlations, self.lift = outputs.split(
            (count, 2 * count, 2 * count, count, 1), dim=-1
        )
        self.log_weights = torch.log_softmax(weights * (1 + bias), -1)
        self.means = means.unflatten(-1, (count, 2))
        self.log_spreads = spreads.unflatten(-1, (count, 2)) - bias
        self.twist = correlations.clamp(-MOST_CORRELATED, MOST_CORRELATED)
        self.lift = self.lift.squeeze(-1)

    @property
    def correlations(self) -> Float[Tensor, "*rows components"]:
        """Rho of each component."""
        return torch.tanh(self.twist)

    def log_components(self, offset: Float[Tensor, "*rows 2"]) -> Float[Tensor, "*rows components"]:
        """log N(offset) of each component.

        With a, b the standardized offsets and rho = tanh(r): Z / (1 - rho^2) = ((a - rho b) cosh r)^2 + b^2, which
        subtracts nothing that is nearly equal, as 1 - rho^2 does where rho is near 1.
        """
        a, b = ((offset[..., None, :] - self.means) * torch.exp(-self.log_spreads)).unbind(-1)
        cosh = torch.cosh(self.twist)
        quadratic = ((a - self.correlations * b) * cosh).square() + b.square()
        # log sqrt(1 - rho^2) = -log cosh r
        out: Tensor = cosh.log() - self.log_spreads.sum(-1) - math.log(2 * math.pi) - 0.5 * quadratic
        return out

    def log_offset(self, offset: Float[Tensor, "*rows 2"]) -> Float[Tensor, " *rows"]:
        """The log density of where the pen goes, in nats."""
        return torch.logsumexp(self.log_weights + self.log_components(offset), -1)

    def log_prob(self, offset: Float[Tensor, "*rows 2"], lifted: Bool[Tensor, " *rows"]) -> Float[Tensor, " *rows"]:
        """The log density of where the pen goes and whether it is lifted there, in nats."""
        return self.log_offset(offset) + F.logsigmoid(torch.where(lifted, self.lift, -self.lift))

    def mode(self) -> Float[Tensor, "*rows 2"]:
        """The mean of the heaviest component."""
        heaviest = self.log_weights.argmax(-1, keepdim=True)[..., None]
        out: Tensor = self.means.gather(-2, heaviest.expand(*heaviest.shape[:-1], 2)).squeeze(-2)
        return out

    def sample(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw an offset (..., 2) and whether the pen is lifted (...)."""
        weights = self.log_weights.exp()
        drawn = torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(*weights.shape[:-1], 1, 1)
        pair = drawn.expand(*drawn.shape[:-1], 2)
        mean, spread = self.means.gather(-2, pair).squeeze(-2), self.log_spreads.gather(-2, pair).squeeze(-2).exp()
        rho = self.correlations.gather(-1, drawn.squeeze(-1)).squeeze(-1)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        across = rho * noise[..., 0] + (1 - rho.square()).sqrt() * noise[..., 1]
        offset = mean + spread * torch.stack((noise[..., 0], across), -1)
        chance = torch.rand(self.lift.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return offset, chance < torch.sigmoid(self.lift)
