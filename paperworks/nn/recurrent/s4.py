"""S4: a linear state space whose kernel is computed through its spectrum (Gu et al. 2021, arXiv:2111.00396), and the
diagonal form S4D (Gu et al. 2022, arXiv:2206.11893).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.initialization import Context
from paperworks.core.linear import residual_output, undecayed
from paperworks.kernels.fft import causal_convolution
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent import hippo
from paperworks.nn.recurrent.documents import Documents
from paperworks.nn.recurrent.recurrence import StateCache, state_of
from paperworks.nn.tap import Tap


@dataclass(frozen=True, kw_only=True)
class S4(Mixer):
    """x' = A x + B u, y = C x + D u on each channel, made discrete by the bilinear rule; then GELU and a gated map.

    A whole sequence is a convolution with K_i = C Ab^i Bb, token by token a recurrence; both are one function.

    Attributes:
        state: numbers a channel remembers (N), even.
        kernel: "nplr", A = Lambda - P P* (normal plus low rank), or "diagonal", A = Lambda (S4D).
        initial: "legs", the HiPPO matrix, or "random", a Gaussian one of the same form (the paper's ablation).
        length: tokens that the kernel of "nplr" is learned for: C (I - Ab^length) is what is trained (Section 4.3),
            so any length up to this one costs as much; longer sequences work and cost matrix powers.
        step_min, step_max: range of the initial steps, log-uniform over the channels.
    """

    state: int = 64
    kernel: Literal["nplr", "diagonal"] = "nplr"
    initial: Literal["legs", "random"] = "legs"
    length: int = 1024
    step_min: float = 1e-3
    step_max: float = 1e-1

    def validate(self) -> None:
        """Check the sizes."""
        if self.state < 2 or self.state % 2:
            raise ValueError(f"S4.state must be even and at least 2, got {self.state}")
        if self.length < 1:
            raise ValueError(f"S4.length must be at least 1, got {self.length}")
        if not 0 < self.step_min <= self.step_max:
            raise ValueError(
                f"S4.step_min must be above 0 and at most step_max, got {self.step_min} and {self.step_max}"
            )

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return S4Module(dim, self)


class System(NamedTuple):
    """The discrete system in real numbers, x = (real parts, imaginary parts) of half of the modes."""

    matrix: Float[Tensor, "channels state state"]
    into: Float[Tensor, "channels state"]
    out: Float[Tensor, "channels state"]


class S4Cache(StateCache):
    """The state; and the discrete system, so that it is not computed again for each token."""

    system: System | None = None


class S4Module(nn.Module):
    """The module of `S4`. Tap: `scanned` (batch, time, dim), what the state space gave.

    `log_step`, `log_decay` (-log real part), `frequency` (imaginary part), `low_rank` (P), `into` (B), `out` and `skip`
    (D) are trained without weight decay, in the paper at a rate of 0.001 whatever the others have:
    `state_space_parameters` gives them. Complex vectors are stored as pairs of real numbers, (dim, state / 2, 2).
    """

    def __init__(self, dim: int, spec: S4) -> None:
        super().__init__()
        self.spec = spec
        half = spec.state // 2
        self.log_step = nn.Parameter(torch.empty(dim))
        self.log_decay = undecayed(nn.Parameter(torch.empty(dim, half)))
        self.frequency = undecayed(nn.Parameter(torch.empty(dim, half)))
        self.low_rank = undecayed(nn.Parameter(torch.empty(dim, half, 2))) if spec.kernel == "nplr" else None
        self.into = undecayed(nn.Parameter(torch.empty(dim, half, 2)))
        self.out = undecayed(nn.Parameter(torch.empty(dim, half, 2)))
        self.skip = nn.Parameter(torch.empty(dim))
        self.scanned = Tap()
        self.output = residual_output(nn.Linear(dim, 2 * dim))
        if self.skip.device.type != "meta":
            self.initialize(Context())

    def state_space_parameters(self) -> list[nn.Parameter]:
        """The parameters of the state space, which are trained at a rate of their own."""
        return list(self.parameters(recurse=False))

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw steps, C and D; A and B are those of HiPPO, the same for every channel, or random ones."""
        spec = self.spec
        modes = hippo.legs_modes(spec.state) if spec.initial == "legs" else hippo.random_modes(spec.state)
        values, low_rank, into = modes
        self.log_step.uniform_(math.log(spec.step_min), math.log(spec.step_max))
        self.log_decay.copy_((-values.real).log())
        self.frequency.copy_(values.imag)
        if self.low_rank is not None:
            self.low_rank.copy_(torch.view_as_real(low_rank))
        self.into.copy_(torch.view_as_real(into))
        self.out.normal_(0.0, math.sqrt(0.5))  # complex N(0, 1)
        self.skip.normal_()
        if spec.kernel == "nplr":
            self.out.copy_(_pairs(_truncated(self._system(learned_is_truncated=False), spec.length)))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> S4Cache:
        """The state before the first token; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return S4Cache(state=torch.zeros(batch, len(self.skip), self.spec.state, dtype=wide, device=device))

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        with torch.autocast(x.device.type, enabled=False):  # spectra need more than half precision
            given = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            if cache is not None:
                scanned = self._recurrent(given, cache, begins)
            elif begins is None:
                scanned = self._convolved(given)
            else:
                documents = Documents(begins)
                scanned = documents.gather(self._convolved(documents.spread(given)))
            scanned = scanned + given * self.skip
        return F.glu(self.output(F.gelu(self.scanned(scanned).to(x.dtype))), -1)

    def kernel(self, time: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "dim time"]:
        """K_0 .. K_{time-1} of every channel."""
        step, decay, frequency, into = (
            part.to(dtype) for part in (self.log_step, self.log_decay, self.frequency, self.into)
        )
        if self.low_rank is None:
            out = _truncated_diagonal(step, decay, frequency, self.out.to(dtype), time)
            return kernel_by_spectrum(step, decay, frequency, into, out, None, time)
        if time <= self.spec.length:
            out, length = self.out, self.spec.length
        else:
            out, length = _pairs(_truncated(self._system(), time)), time
        low_rank = self.low_rank.to(dtype)
        return kernel_by_spectrum(step, decay, frequency, into, out.to(dtype), low_rank, length)[:, :time]

    def _convolved(self, x: Tensor) -> Tensor:
        return causal_convolution(x, self.kernel(x.shape[1], x.dtype))

    def _recurrent(self, x: Tensor, cache: StateCache, begins: Bool[Tensor, "batch time"] | None) -> Tensor:
        """Go on from the cache's state, one token after the other."""
        system = cache.system if isinstance(cache, S4Cache) and not torch.is_grad_enabled() else None
        if system is None:
            system = System(*(part.to(x.dtype) for part in self._system()))
            if isinstance(cache, S4Cache) and not torch.is_grad_enabled():
                cache.system = system
        onward, into, out = system.matrix.transpose(1, 2), system.into[:, None], system.out[..., None]
        state = cache["state"].transpose(0, 1).to(x.dtype)  # channels first: one product a channel
        keeps = None if begins is None else (~begins).to(x.dtype).unbind(1)
        shown = []
        for step, present in enumerate(x.permute(1, 2, 0)):  # (channels, batch)
            if keeps is not None:
                state = state * keeps[step][:, None]
            state = torch.baddbmm(present[..., None] * into, state, onward)
            shown.append(torch.bmm(state, out).squeeze(-1))
        cache["state"] = state.transpose(0, 1)
        return torch.stack(shown).permute(2, 0, 1)

    def _system(self, learned_is_truncated: bool | None = None) -> System:
        """The discrete system in float64; C is got back from C (I - Ab^length) where that is what is learned."""
        if learned_is_truncated is None:
            learned_is_truncated = self.spec.kernel == "nplr"
        frequency, decay = self.frequency.double(), -torch.exp(self.log_decay.double())
        real, turned = torch.diag_embed(decay), torch.diag_embed(frequency)
        matrix = torch.cat((torch.cat((real, -turned), -1), torch.cat((turned, real), -1)), -2)
        if self.low_rank is not None:
            # P P* x over both halves of the conjugate pairs is P times twice the real part of P* x
            low_rank = _stacked(self.low_rank.double())
            matrix = matrix - 2 * low_rank[:, :, None] * low_rank[:, None, :]
        step = torch.exp(self.log_step.double())[:, None, None]
        same = torch.eye(self.spec.state, dtype=torch.float64, device=matrix.device)
        into = _stacked(self.into.double())[..., None] * step
        solved = torch.linalg.solve(same - step / 2 * matrix, torch.cat((same + step / 2 * matrix, into), -1))
        discrete, into = solved[..., :-1], solved[..., -1]
        # y = 2 Re(C x)
        out = _stacked(self.out.double()) * torch.tensor([2.0, -2.0], device=into.device).repeat_interleave(
            self.spec.state // 2
        )
        if learned_is_truncated:
            rest = same - torch.linalg.matrix_power(discrete, self.spec.length)
            out = torch.linalg.solve(rest.transpose(1, 2), out)
        return System(discrete, into, out)


def _stacked(pairs: Float[Tensor, "channels half 2"]) -> Float[Tensor, "channels state"]:
    return pairs.transpose(1, 2).flatten(1)


def _truncated(system: System, length: int) -> Float[Tensor, "channels state"]:
    """C (I - Ab^length), by which the spectrum of the endless kernel becomes that of its first tokens."""
    powers = torch.linalg.matrix_power(system.matrix, length)
    return system.out - torch.einsum("cn,cnm->cm", system.out, powers)


def _truncated_diagonal(log_step: Tensor, log_decay: Tensor, frequency: Tensor, out: Tensor, length: int) -> Tensor:
    """The same of a diagonal system, elementwise and as pairs: Ab = (1 + Delta L / 2) / (1 - Delta L / 2)."""
    half_step = torch.exp(log_step)[:, None] / 2
    scaled = torch.complex(-torch.exp(log_decay) * half_step, frequency * half_step)
    powers = ((1 + scaled) / (1 - scaled)) ** length
    return torch.view_as_real(torch.view_as_complex(out) * (1 - powers))


def _pairs(out: Float[Tensor, "channels state"]) -> Float[Tensor, "channels half 2"]:
    """The complex C (as pairs) of which `out` is twice the real part and minus twice the imaginary one."""
    real, imaginary = out.chunk(2, -1)
    return torch.stack((real / 2, -imaginary / 2), -1)


def kernel_by_spectrum(
    log_step: Float[Tensor, " channels"],
    log_decay: Float[Tensor, "channels half"],
    frequency: Float[Tensor, "channels half"],
    into: Float[Tensor, "channels half 2"],
    out: Float[Tensor, "channels half 2"],
    low_rank: Float[Tensor, "channels half 2"] | None,
    length: int,
) -> Float[Tensor, "channels length"]:
    """The kernel from its generating function at the roots of unity (Algorithm 1): Cauchy products, Woodbury.

    Args:
        log_step: log Delta; log_decay, frequency: log of minus the real part of Lambda, and its imaginary part.
        into, low_rank: B and P in the basis of the modes, half of the conjugate pairs.
        out: C (I - Ab^length), row vectors.
        length: tokens.

    K(z) = 2 / (1 + z) [k(C, B) - k(C, P) k(P*, B) / (1 + k(P*, P))], k(a, b) = sum of a_n b_n / (g - Lambda_n) over
    all modes, g = 2 (1 - z) / (Delta (1 + z)). With z = e^(-i angle), numerator and denominator are multiplied by
    cos(angle / 2), which takes the pole at z = -1 away; its value there, Delta / 2 sum C_n B_n, comes out by itself.
    """
    angle = torch.arange(length // 2 + 1, dtype=log_step.dtype, device=log_step.device) * (math.pi / length)
    cosine = torch.cos(angle)
    turn = 2 * torch.sin(angle) * torch.exp(-log_step)[:, None]  # g cos(angle / 2) / i, (channels, points)
    # one conjugate pair: a / (g - L) + conj a / (g - conj L) = 2 (Re(a) g - Re(a conj L)) / (g^2 - 2 Re(L) g + |L|^2)
    decay = -torch.exp(log_decay)
    size = torch.sqrt(decay.square() + frequency.square())[..., None]
    wide = turn[:, None]
    real = (size * cosine - wide) * (size * cosine + wide)
    imaginary = -2 * decay[..., None] * (wide * cosine)
    scale = 1 / (real.square() + imaginary.square())
    inverse = torch.cat((real * scale, -imaginary * scale), -1)  # (channels, half, 2 points)

    first, second = [torch.view_as_complex(out)], [torch.view_as_complex(into)]
    if low_rank is not None:
        rank = torch.view_as_complex(low_rank)
        first, second = [first[0], first[0], rank.conj(), rank.conj()], [second[0], rank, second[0], rank]
    products = torch.stack(first, 1) * torch.stack(second, 1)  # (channels, 1 or 4, half)
    values = torch.complex(decay, frequency)[:, None]
    rows = torch.cat((products.real, (products * values.conj()).real), 1) @ inverse
    (plain_real, plain_imaginary), (other_real, other_imaginary) = (part.chunk(2, -1) for part in rows.chunk(2, 1))
    wide = turn[:, None]
    sums = 2 * torch.complex(
        -wide * plain_imaginary - cosine * other_real, wide * plain_real - cosine * other_imaginary
    )
    spectrum = sums[:, 0]
    if low_rank is not None:
        spectrum = spectrum - cosine * sums[:, 1] * sums[:, 2] / (1 + cosine * sums[:, 3])
    result: Tensor = torch.fft.irfft(spectrum * torch.polar(torch.ones_like(angle), angle), n=length)
    return result
