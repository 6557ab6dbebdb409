"""RWKV-4: time mixing and channel mixing (Peng et al. 2023, arXiv:2305.13048).

Both look at the token before, so both are mixers: a layer of the paper is a block of `RWKV` and a block of
`RWKVChannelMix`, none with a feed-forward part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.core.initialization import Context
from paperworks.core.linear import residual_output
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import StateCache, before, linear_recurrence, state_of
from paperworks.nn.tap import Tap

NOTHING = -1e38  # the exponent of an empty history


@dataclass(frozen=True, kw_only=True)
class RWKV(Mixer):
    """Time mixing: out(sigmoid(r) * wkv), wkv a mean of all values so far that fades, channel by channel.

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v), w > 0 and u learned;
    r, k and v read a blend of the token and the one before it.
    """

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return TimeMix(dim)


@dataclass(frozen=True, kw_only=True)
class RWKVChannelMix(Mixer):
    """Channel mixing: sigmoid(r) * (W_v relu(W_k .)^2), each reading a blend of the token and the one before it.

    Attributes:
        hidden: width inside; None means 4 dim.
    """

    hidden: int | None = None

    def validate(self) -> None:
        """Check the width."""
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"RWKVChannelMix.hidden must be at least 1, got {self.hidden}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return ChannelMix(dim, 4 * dim if self.hidden is None else self.hidden)


def wkv(
    key: Float[Tensor, "batch time dim"],
    value: Float[Tensor, "batch time dim"],
    decay: Float[Tensor, " dim"],
    bonus: Float[Tensor, " dim"],
    state: Float[Tensor, "batch three dim"] | None = None,
    begins: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch three dim"]]:
    """The fading means of all values, and the state after the last token.

    Numerator a and denominator b are kept divided by e^p, p the largest exponent so far, so nothing overflows however
    large the keys are. p is no function of what is learned as far as the result goes: it cancels.

    Args:
        key, value: k and v; decay: w > 0, what an exponent loses a token; bonus: u, for the present token.
        state: (a, b, p) before the first token; None is an empty history.
        begins: where the history is empty again.
    """
    if state is None:
        state = torch.zeros(len(key), 3, key.shape[-1], dtype=key.dtype, device=key.device)
        state[:, 2] = NOTHING
    exponents = _largest_exponents(key.detach(), decay.detach(), state[:, 2].detach(), begins)
    earlier = torch.cat((state[:, None, 2].detach(), exponents[:, :-1]), 1)
    if begins is not None:
        earlier = earlier.masked_fill(begins[..., None], NOTHING)
    keeps, adds = torch.exp(earlier - decay - exponents), torch.exp(key - exponents)
    drive = torch.stack((adds * value, adds), 2)
    sums = linear_recurrence(keeps[:, :, None].expand_as(drive), drive, state[:, :2])
    past = torch.cat((state[:, None, :2], sums[:, :-1]), 1)
    present = bonus + key
    top = torch.maximum(earlier, present.detach())
    old, new = torch.exp(earlier - top), torch.exp(present - top)
    if begins is not None:
        old = old.masked_fill(begins[..., None], 0.0)
    mean = (old * past[:, :, 0] + new * value) / (old * past[:, :, 1] + new)
    return mean, torch.cat((sums[:, -1], exponents[:, -1:]), 1)


@torch.no_grad()
def _largest_exponents(key: Tensor, decay: Tensor, last: Tensor, begins: Tensor | None) -> Tensor:
    """p_t = max(p_{t-1} - w, k_t)."""
    keys = key.transpose(0, 1).contiguous()
    found = torch.empty_like(keys)
    for step, (present, out) in enumerate(zip(keys.unbind(0), found.unbind(0), strict=True)):
        if begins is not None:
            last = last.masked_fill(begins[:, step, None], NOTHING)
        last = torch.maximum(last - decay, present, out=out)
    return found.transpose(0, 1)


def _blend(x: Tensor, last: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(last, x, share.to(x.dtype))


class TimeMix(nn.Module):
    """The module of `RWKV`. Tap: `mean` (batch, time, dim), what the fading memory gave."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = residual_output(nn.Linear(dim, dim, bias=False))
        self.blend_receptance = nn.Parameter(torch.empty(dim))
        self.blend_key = nn.Parameter(torch.empty(dim))
        self.blend_value = nn.Parameter(torch.empty(dim))
        self.log_decay = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(dim))
        self.mean = Tap()
        if self.bonus.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as the paper does (Appendix E); in a model of alternating blocks, layer // 2 is the paper's layer."""
        dim = len(self.bonus)
        depths, place = _depths(context.layer, context.depth), torch.arange(dim) / dim
        channel = torch.arange(dim) / max(dim - 1, 1)
        self.log_decay.copy_(-5 + 8 * channel ** (0.7 + 1.3 * depths))
        self.bonus.copy_(0.5 * (((torch.arange(dim) + 1) % 3) - 1) + math.log(0.3))
        self.blend_key.copy_(place ** (1 - depths))
        self.blend_value.copy_(place ** (1 - depths) + 0.3 * depths)
        self.blend_receptance.copy_(place ** (0.5 * (1 - depths)))
        for linear in (self.receptance, self.key, self.output):
            linear.weight.zero_()
        nn.init.orthogonal_(self.value.weight)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """An empty history; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dim = len(self.bonus)
        state = torch.zeros(batch, 3, dim, dtype=wide, device=device)
        state[:, 2] = NOTHING
        return StateCache(last=torch.zeros(batch, dim, dtype=dtype, device=device), state=state)

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        last = before(x, None if cache is None else cache["last"], begins)
        receptance = self.receptance(_blend(x, last, self.blend_receptance))
        key, value = self.key(_blend(x, last, self.blend_key)), self.value(_blend(x, last, self.blend_value))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, state = wkv(
            key.to(wide),
            value.to(wide),
            torch.exp(self.log_decay.to(wide)),
            self.bonus.to(wide),
            None if cache is None else cache["state"],
            begins,
        )
        if cache is not None:
            cache["last"], cache["state"] = x[:, -1], state
        out: Tensor = self.output(torch.sigmoid(receptance) * self.mean(mean).to(x.dtype))
        return out


class ChannelMix(nn.Module):
    """The module of `RWKVChannelMix`. Tap: `hidden` (batch, time, hidden), the squared activations."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, hidden, bias=False)
        self.value = residual_output(nn.Linear(hidden, dim, bias=False))
        self.blend_receptance = nn.Parameter(torch.empty(dim))
        self.blend_key = nn.Parameter(torch.empty(dim))
        self.hidden = Tap()
        if self.blend_key.device.type != "meta":
            self.initialize(Context(layer=1, depth=2))

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as the paper does; in a model of alternating blocks, layer // 2 is the paper's layer."""
        dim = len(self.blend_key)
        blend = (torch.arange(dim) / dim) ** (1 - _depths(context.layer, context.depth))
        self.blend_key.copy_(blend)
        self.blend_receptance.copy_(blend)
        nn.init.orthogonal_(self.key.weight, gain=math.sqrt(max(1.0, self.key.out_features / dim)))
        self.receptance.weight.zero_()
        self.value.weight.zero_()

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The token before the first: zeros."""
        return StateCache(last=torch.zeros(batch, len(self.blend_key), dtype=dtype, device=device))

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix each token with the one before it."""
        cache = state_of(placement)
        last = before(x, None if cache is None else cache["last"], placement.begins())
        if cache is not None:
            cache["last"] = x[:, -1]
        hidden = self.hidden(torch.relu(self.key(_blend(x, last, self.blend_key))).square())
        out: Tensor = torch.sigmoid(self.receptance(_blend(x, last, self.blend_receptance))) * self.value(hidden)
        return out


def _depths(layer: int, depth: int) -> float:
    """l / (L - 1) of the paper's layer in a model of `depth` blocks, two a layer."""
    return (layer // 2) / max(depth // 2 - 1, 1)
