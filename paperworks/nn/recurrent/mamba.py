"""Mamba: selective state spaces (Gu & Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paperworks.core.initialization import Context
from paperworks.core.linear import residual_output, undecayed
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import CausalConvolution, StateCache, doubling_recurrence, state_of
from paperworks.nn.tap import Tap

# Steps whose states exist at once: (CHUNK, batch, channels, state) numbers. Others are computed again when needed.
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Mamba(Mixer):
    """h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t, y_t = C_t h_t + D x_t; Delta, B and C depend on the token.

    Around it a causal convolution and a gate: out(y * silu(z)), (x, z) = in(input), x = silu(conv(x)).

    Attributes:
        state: numbers a channel remembers (N).
        expand: channels inside, as a multiple of dim (E).
        width: tokens the convolution sees.
        rank: of the map to Delta; None means ceil(dim / 16).
        selective: whether Delta, B and C depend on the token; if not they are learned constants, and what is left is a
            time-invariant system (the paper's ablation).
    """

    state: int = 16
    expand: int = 2
    width: int = 4
    rank: int | None = None
    selective: bool = True

    def validate(self) -> None:
        """Check the sizes."""
        for name in ("state", "expand", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"Mamba.{name} must be at least 1, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"Mamba.rank must be at least 1, got {self.rank}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return MambaModule(dim, self)


class MambaModule(nn.Module):
    """The module of `Mamba`. Taps: `delta` (batch, time, channels) and `scanned`, what the state gave, as large."""

    def __init__(self, dim: int, spec: Mamba) -> None:
        super().__init__()
        self.spec = spec
        self.channels = spec.expand * dim
        self.rank = math.ceil(dim / 16) if spec.rank is None else spec.rank
        self.input = nn.Linear(dim, 2 * self.channels, bias=False)
        self.convolution = CausalConvolution(self.channels, spec.width)
        if spec.selective:
            self.select = nn.Linear(self.channels, self.rank + 2 * spec.state, bias=False)
            self.step = nn.Linear(self.rank, self.channels)
        else:
            self.constant_step = nn.Parameter(torch.empty(self.channels))
            self.constant_in = nn.Parameter(torch.empty(spec.state))
            self.constant_out = nn.Parameter(torch.empty(spec.state))
        self.log_decay = undecayed(nn.Parameter(torch.empty(self.channels, spec.state)))
        self.skip = nn.Parameter(torch.empty(self.channels))
        self.delta = Tap()
        self.scanned = Tap()
        self.output = residual_output(nn.Linear(self.channels, dim, bias=False))
        if self.skip.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as the reference does: A = -(1 .. N), D = 1, steps log-uniform on [0.001, 0.1], projections uniform."""
        for linear in (self.input, *((self.select,) if self.spec.selective else ())):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.output.weight, a=math.sqrt(5))
        self.output.weight /= math.sqrt(context.depth)
        self.convolution.reset_parameters()
        self.log_decay.copy_(torch.arange(1, self.spec.state + 1).log().expand_as(self.log_decay))
        self.skip.fill_(1.0)
        steps = torch.exp(torch.empty(self.channels).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        before_softplus = steps + torch.log(-torch.expm1(-steps))
        if self.spec.selective:
            nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
            self.step.bias.copy_(before_softplus)
        else:
            self.constant_step.copy_(before_softplus)
            for vector in (self.constant_in, self.constant_out):
                vector.normal_()

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The state before the first token; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return StateCache(
            window=self.convolution.new_window(batch, dtype, device),
            state=torch.zeros(batch, self.channels, self.spec.state, dtype=wide, device=device),
        )

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        inner, gate = self.input(x).chunk(2, -1)
        inner, window = self.convolution(inner, None if cache is None else cache["window"], begins)
        inner = F.silu(inner)
        delta, into, out = self._select(inner)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        decay = -torch.exp(self.log_decay.to(wide))
        scanned, state = selective_scan(
            inner.to(wide),
            delta.to(wide),
            decay,
            into.to(wide),
            out.to(wide),
            None if cache is None else cache["state"],
            begins,
        )
        if cache is not None:
            cache["window"], cache["state"] = window, state
        scanned = self.scanned(scanned + inner * self.skip.to(wide)).to(x.dtype)
        result: Tensor = self.output(scanned * F.silu(gate))
        return result

    def _select(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Delta (batch, time, channels), B and C (batch, time, state)."""
        if self.spec.selective:
            low, into, out = self.select(inner).split((self.rank, self.spec.state, self.spec.state), -1)
            return self.delta(F.softplus(self.step(low))), into, out
        shape = (*inner.shape[:2], self.spec.state)
        delta = F.softplus(self.constant_step).expand_as(inner)
        return self.delta(delta), self.constant_in.expand(shape), self.constant_out.expand(shape)


def selective_scan(
    x: Float[Tensor, "batch time channels"],
    delta: Float[Tensor, "batch time channels"],
    decay: Float[Tensor, "channels state"],
    into: Float[Tensor, "batch time state"],
    out: Float[Tensor, "batch time state"],
    initial: Float[Tensor, "batch channels state"] | None = None,
    begins: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels state"]]:
    """y_t = C_t h_t of h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t, and the last state.

    Args:
        x, delta: inputs and steps; decay: A, negative; into, out: B and C.
        initial: the state before; None is zero.
        begins: where the state starts from zero again.

    On a CPU it goes in pieces of `CHUNK` steps and keeps one state a piece; elsewhere all states are computed by
    doubling.
    """
    if initial is None:
        initial = x.new_zeros(x.shape[0], *decay.shape)
    keeps = None if begins is None else (~begins).to(x.dtype)
    if x.device.type != "cpu":
        factors, drive = _discretized(x, delta, decay, into, keeps)
        states = doubling_recurrence(factors, drive, initial)
        return torch.einsum("btcn,btn->btc", states, out), states[:, -1]
    scanned: tuple[Tensor, Tensor] = _Scan.apply(x, delta, decay, into, out, initial, keeps)  # type: ignore[no-untyped-call]
    return scanned


def _discretized(x: Tensor, delta: Tensor, decay: Tensor, into: Tensor, keeps: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(Delta A), zero where a segment begins, and Delta B x: (..., channels, state)."""
    factors = torch.exp(delta[..., None] * decay)
    if keeps is not None:
        factors = factors * keeps[..., None, None]
    return factors, (delta * x)[..., None] * into[..., None, :]


class _Scan(torch.autograd.Function):
    """The scan in pieces, time first. The backward pass computes each piece's states again from its first one."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        x, delta, decay, into, out, initial, keeps = given
        x, delta, into, out = (tensor.transpose(0, 1).contiguous() for tensor in (x, delta, into, out))
        kept = None if keeps is None else keeps.transpose(0, 1)
        state, starts, scanned = initial, [], torch.empty_like(x)
        for piece in _pieces(len(x)):
            starts.append(state)
            _, states = _states(x, delta, decay, into, kept, piece, state)
            torch.matmul(states, out[piece][..., None], out=scanned[piece][..., None])
            state = states[-1].clone()
        ctx.save_for_backward(x, delta, decay, into, out, *([] if kept is None else [kept]), *starts)
        ctx.masked = kept is not None
        return scanned.transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, decay, into, out, *rest = ctx.saved_tensors
        kept = rest.pop(0) if ctx.masked else None
        to_scanned = above[0].transpose(0, 1)
        carried = above[1].clone()  # the gradient of the state after the piece
        to_x, to_delta = torch.empty_like(x), torch.empty_like(delta)
        to_into, to_out, to_decay = torch.empty_like(into), torch.empty_like(out), torch.zeros_like(decay)
        for piece, start in reversed(list(zip(_pieces(len(x)), rest, strict=True))):
            factors, states = _states(x, delta, decay, into, kept, piece, start)
            upstream = to_scanned[piece]
            to_out[piece] = torch.matmul(upstream[..., None, :], states).squeeze(-2)
            to_states = upstream[..., None] * out[piece][..., None, :]
            to_states[-1] += carried
            rows, steps = to_states.unbind(0), factors.unbind(0)
            for step in range(len(rows) - 2, -1, -1):
                rows[step].addcmul_(steps[step + 1], rows[step + 1])
            carried = steps[0] * rows[0]
            earlier = torch.cat((start[None], states[:-1]))
            exponent = to_states * earlier * factors  # the gradient of Delta A
            weighted = torch.matmul(to_states, into[piece][..., None]).squeeze(-1)  # of Delta x
            to_delta[piece] = (exponent * decay).sum(-1) + weighted * x[piece]
            to_x[piece] = weighted * delta[piece]
            to_decay += torch.einsum("tbcn,tbc->cn", exponent, delta[piece])
            drive = delta[piece] * x[piece]
            to_into[piece] = torch.matmul(drive[..., None, :], to_states).squeeze(-2)
        grads = [tensor.transpose(0, 1) for tensor in (to_x, to_delta)]
        return grads[0], grads[1], to_decay, to_into.transpose(0, 1), to_out.transpose(0, 1), carried, None


def _pieces(time: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, time)) for start in range(0, time, CHUNK)]


def _states(
    x: Tensor, delta: Tensor, decay: Tensor, into: Tensor, kept: Tensor | None, piece: slice, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors of one piece and its states, (time, batch, channels, state)."""
    factors, states = _discretized(x[piece], delta[piece], decay, into[piece], None if kept is None else kept[piece])
    for factor, new in zip(factors.unbind(0), states.unbind(0), strict=True):
        state = new.addcmul_(factor, state)
    return factors, states
