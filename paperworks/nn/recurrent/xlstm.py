"""xLSTM: exponential gates, with a scalar memory (sLSTM) and a matrix memory (mLSTM) (Beck et al. 2024,
arXiv:2405.04517).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.initialization import Context
from paperworks.core.linear import residual_output
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import CausalConvolution, StateCache, state_of
from paperworks.nn.tap import Tap

NOTHING = -1e30  # the stabiliser of an empty memory: its weight is exp of this, 0
PIECE = 64  # tokens that see each other at once; memory carries from piece to piece


@dataclass(frozen=True, kw_only=True)
class _Heads(Mixer):
    """Fields of both kinds.

    Attributes:
        heads: memories side by side, each on its share of the channels.
        width: tokens that the causal convolution before the gates sees.
    """

    heads: int = 4
    width: int = 4

    def validate(self) -> None:
        """Check the sizes."""
        for name in ("heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class MLSTM(_Heads):
    """Matrix memory: C_t = f_t C_{t-1} + i_t v k^T, n_t = f_t n_{t-1} + i_t k, h = C q / max(|n . q|, 1).

    i = exp(.), f = sigmoid(.), one number a head; computed with a running stabiliser. Around it, as the paper's block
    has it: up to (x, z), a convolution on x for queries and keys, a norm by head, a gate silu(z), and down.

    Attributes:
        expand: channels inside, as a multiple of dim.
        block: queries, keys and values are maps of so many channels each (block-diagonal).
    """

    expand: int = 2
    block: int = 4

    def validate(self) -> None:
        """Check the sizes."""
        super().validate()
        for name in ("expand", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"MLSTM.{name} must be at least 1, got {getattr(self, name)}")

    def check(self, dim: int) -> None:
        """Raise `ValueError` if heads and blocks do not divide the inner channels."""
        for name in ("heads", "block"):
            if self.expand * dim % getattr(self, name):
                raise ValueError(
                    f"MLSTM.{name} ({getattr(self, name)}) must divide expand x dim ({self.expand} x {dim})"
                )

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return MLSTMModule(dim, self)


@dataclass(frozen=True, kw_only=True)
class SLSTM(_Heads):
    """Scalar memory with exponential input gates: c = f c + i tanh(z), n = f n + i, h = sigmoid(o) c / n.

    All four gates see h_{t-1} through matrices of their head, so it can track a state that a linear recurrence
    cannot; one token after the other. i and f read a causal convolution of the input, z and o the input itself.

    Attributes:
        forget: "sigmoid" (the reference) or "exponential".
    """

    forget: str = "sigmoid"

    def validate(self) -> None:
        """Check the sizes and the gate."""
        super().validate()
        if self.forget not in ("sigmoid", "exponential"):
            raise ValueError(f"SLSTM.forget must be 'sigmoid' or 'exponential', got {self.forget!r}")

    def check(self, dim: int) -> None:
        """Raise `ValueError` if heads do not divide `dim`."""
        if dim % self.heads:
            raise ValueError(f"SLSTM.heads ({self.heads}) must divide dim ({dim})")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return SLSTMModule(dim, self)


class BlockDiagonal(nn.Module):
    """y = W x with W block-diagonal: `count` blocks of equal size, (..., channels) -> (..., channels)."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        size = channels // count
        self.weight = nn.Parameter(torch.empty(count, size, size))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (5 * size)))  # "small" init, as the reference

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        """Apply the map."""
        parts = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("btni,noi->btno", parts, self.weight).flatten(-2)


class HeadNorm(nn.Module):
    """LayerNorm of each head's channels by themselves, with a gain and no bias: (batch, heads, time, channels)."""

    def __init__(self, channels: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, channels // heads))
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch heads time size"]) -> Float[Tensor, "batch time channels"]:
        """Normalize, and put the heads side by side."""
        return (F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight).transpose(1, 2).flatten(-2)


Memory = tuple[Tensor, Tensor, Tensor]  # C (batch, heads, key, value), n (batch, heads, key), m (batch, heads)


def matrix_memory(
    query: Float[Tensor, "batch heads time size"],
    key: Float[Tensor, "batch heads time size"],
    value: Float[Tensor, "batch heads time size"],
    enter: Float[Tensor, "batch heads time"],
    forget: Float[Tensor, "batch heads time"],
    memory: Memory | None = None,
    begins: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch heads time size"], Memory]:
    """What the matrix memory gives at each token, and the memory after the last.

    `enter` and `forget` are the gates before exp and sigmoid; keys are scaled by size^-0.5 here. Tokens of one piece
    see each other by a matrix of weights, as attention does (the paper's parallel form); what came before comes in
    through the memory (its recurrent form). So one token at a time, in pieces, or all at once are one function.
    """
    if memory is None:
        memory = empty_memory(query)
    key = key * query.shape[-1] ** -0.5
    forget = F.logsigmoid(forget)
    outputs = []
    for start in range(0, query.shape[2], PIECE):
        part = slice(start, start + PIECE)
        given = query[:, :, part], key[:, :, part], value[:, :, part], enter[:, :, part], forget[:, :, part]
        out, memory = _piece(*given, memory, None if begins is None else begins[:, part])
        outputs.append(out)
    return torch.cat(outputs, 2), memory


def empty_memory(query: Float[Tensor, "batch heads time size"]) -> Memory:
    """The memory before the first token."""
    batch, heads, _, size = query.shape
    matrix = query.new_zeros(batch, heads, size, size)
    return matrix, matrix[..., 0].clone(), query.new_full((batch, heads), NOTHING)


def _piece(
    query: Tensor, key: Tensor, value: Tensor, enter: Tensor, forget: Tensor, memory: Memory, begins: Tensor | None
) -> tuple[Tensor, Memory]:
    matrix, norm, stabiliser = memory
    time = query.shape[2]
    faded = forget.cumsum(-1)  # log of what is left of the memory before the piece
    # log weight of token s at token t: sum of log f over s+1 .. t, plus the gate of s
    weight = faded[..., :, None] - faded[..., None, :] + enter[..., None, :]
    seen = torch.ones(time, time, dtype=torch.bool, device=query.device).tril()
    earlier = faded + stabiliser[..., None]
    if begins is not None:
        document = begins.long().cumsum(1)
        seen = seen & (document[:, :, None] == document[:, None, :])[:, None]
        earlier = earlier.masked_fill((document > 0)[:, None], NOTHING)
    weight = weight.masked_fill(~seen, -math.inf)
    largest = torch.maximum(weight.amax(-1), earlier)
    scores = (query @ key.transpose(-1, -2)) * torch.exp(weight - largest[..., None])
    old = torch.exp(earlier - largest)
    numerator = scores @ value + old[..., None] * (query @ matrix)
    amount = scores.sum(-1) + old * (query @ norm[..., None]).squeeze(-1)
    out = numerator / torch.maximum(amount.abs(), torch.exp(-largest))[..., None]
    # the row of the last token says what stays
    last = largest[..., -1]
    stays, adds = old[..., -1], torch.exp(weight[..., -1, :] - last[..., None])
    weighted = key * adds[..., None]
    matrix = stays[..., None, None] * matrix + weighted.transpose(-1, -2) @ value
    norm = stays[..., None] * norm + weighted.sum(-2)
    return out, (matrix, norm, last)


class MLSTMModule(nn.Module):
    """The module of `MLSTM`. Tap: `heads` (batch, heads, time, size), what the memories gave."""

    def __init__(self, dim: int, spec: MLSTM) -> None:
        super().__init__()
        spec.check(dim)
        self.spec = spec
        channels = spec.expand * dim
        self.channels = channels
        self.up = nn.Linear(dim, 2 * channels, bias=False)
        self.convolution = CausalConvolution(channels, spec.width)
        count = channels // spec.block
        self.query, self.key, self.value = (BlockDiagonal(channels, count) for _ in range(3))
        self.enter = nn.Linear(3 * channels, spec.heads)
        self.forget = nn.Linear(3 * channels, spec.heads)
        self.heads = Tap()
        self.norm = HeadNorm(channels, spec.heads)
        self.skip = nn.Parameter(torch.ones(channels))
        self.down = residual_output(nn.Linear(channels, dim, bias=False))
        if self.skip.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as the reference does: gates that depend on nothing yet, and remember for 20 to 400 tokens."""
        self.enter.weight.zero_()
        self.forget.weight.zero_()
        self.enter.bias.normal_(0.0, 0.1)
        self.forget.bias.copy_(torch.linspace(3.0, 6.0, self.spec.heads))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """An empty memory; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        size = self.channels // self.spec.heads
        matrix, norm, stabiliser = empty_memory(torch.empty(batch, self.spec.heads, 0, size, dtype=wide, device=device))
        window = self.convolution.new_window(batch, dtype, device)
        return StateCache(window=window, matrix=matrix, norm=norm, stabiliser=stabiliser)

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        inner, gate = self.up(x).chunk(2, -1)
        convolved, window = self.convolution(inner, None if cache is None else cache["window"], begins)
        convolved = F.silu(convolved)
        query, key, value = self.query(convolved), self.key(convolved), self.value(inner)
        together = torch.cat((query, key, value), -1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        parts = [part.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2).to(wide) for part in (query, key, value)]
        enter, forget = (layer(together).transpose(1, 2).to(wide) for layer in (self.enter, self.forget))
        memory = None if cache is None else (cache["matrix"], cache["norm"], cache["stabiliser"])
        out, memory = matrix_memory(parts[0], parts[1], parts[2], enter, forget, memory, begins)
        if cache is not None:
            cache["window"] = window
            cache["matrix"], cache["norm"], cache["stabiliser"] = memory
        mixed = self.norm(self.heads(out).to(x.dtype)) + self.skip * convolved
        result: Tensor = self.down(mixed * F.silu(gate))
        return result


class SLSTMModule(nn.Module):
    """The module of `SLSTM`. Tap: `heads` (batch, heads, time, size), the hidden states."""

    def __init__(self, dim: int, spec: SLSTM) -> None:
        super().__init__()
        spec.check(dim)
        self.spec = spec
        self.dim, self.size = dim, dim // spec.heads
        self.convolution = CausalConvolution(dim, spec.width)
        self.enter, self.forget, self.candidate, self.leave = (BlockDiagonal(dim, spec.heads) for _ in range(4))
        self.recurrent = nn.Parameter(torch.empty(spec.heads, self.size, 4 * self.size))
        self.bias = nn.Parameter(torch.empty(spec.heads, 4 * self.size))
        self.heads = Tap()
        self.norm = HeadNorm(dim, spec.heads)
        if self.bias.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Set recurrent matrices and biases to zero, the forget gate's spread over the channels (reference)."""
        self.recurrent.zero_()
        self.bias.zero_()
        # powers of a block-dependent exponent, from -5 to 7: some channels forget at once, some hardly
        exponent = 0.3 + 1.3 * context.layer / max(context.depth - 1, 1)
        spread = torch.arange(self.size) / max(self.size - 1, 1)
        self.bias[:, self.size : 2 * self.size] = 12 * spread**exponent - 5

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The state before the first token; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch, self.spec.heads, self.size, dtype=wide, device=device)
        window = self.convolution.new_window(batch, dtype, device)
        parts = {"hidden": zeros, "cell": zeros.clone(), "norm": zeros.clone(), "stabiliser": zeros + NOTHING}
        return StateCache(window=window, **parts)

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        convolved, window = self.convolution(x, None if cache is None else cache["window"], begins)
        convolved = F.silu(convolved)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        gates = [self.enter(convolved), self.forget(convolved), self.candidate(x), self.leave(x)]
        given = torch.cat([gate.unflatten(-1, (self.spec.heads, -1)) for gate in gates], -1).to(wide) + self.bias
        start = self.new_cache(len(x), 1, x.dtype, x.device) if cache is None else cache
        state = tuple(start[name] for name in ("hidden", "cell", "norm", "stabiliser"))
        empty = self.new_cache(len(x), 1, x.dtype, x.device)
        outputs = []
        for step, present in enumerate(given.unbind(1)):
            if begins is not None:
                anew = begins[:, step, None, None]
                state = tuple(
                    torch.where(anew, empty[name], part)
                    for name, part in zip(("hidden", "cell", "norm", "stabiliser"), state, strict=True)
                )
            state = self._step(present, *state)
            outputs.append(state[0])
        if cache is not None:
            cache["window"] = window
            for name, part in zip(("hidden", "cell", "norm", "stabiliser"), state, strict=True):
                cache[name] = part
        out: Tensor = self.norm(self.heads(torch.stack(outputs, 2)).to(x.dtype))
        return out

    def _step(
        self, given: Tensor, hidden: Tensor, cell: Tensor, norm: Tensor, stabiliser: Tensor
    ) -> tuple[Tensor, ...]:
        raw = given + torch.einsum("bhi,hio->bho", hidden, self.recurrent.to(hidden.dtype))
        enter, forget, candidate, leave = raw.chunk(4, -1)
        faded = stabiliser + (F.logsigmoid(forget) if self.spec.forget == "sigmoid" else forget)
        largest = torch.maximum(faded, enter)
        adds, stays = torch.exp(enter - largest), torch.exp(faded - largest)
        cell = stays * cell + adds * torch.tanh(candidate)
        norm = stays * norm + adds
        return torch.sigmoid(leave) * cell / norm, cell, norm, largest
