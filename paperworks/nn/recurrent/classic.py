"""Recurrent networks as mixers: Elman (1990), LSTM with and without peepholes and layer norms, GRU in both forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.initialization import Context
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import StateCache, state_of
from paperworks.nn.tap import Tap

State = tuple[Tensor, ...]  # (batch, hidden) each; the first one is what the layer puts out


@dataclass(frozen=True, kw_only=True)
class RecurrentMixer(Mixer):
    """A recurrent layer.

    Attributes:
        hidden: width of the state; None means dim. Another width is mapped back to dim by a linear layer.
    """

    hidden: int | None = None

    def validate(self) -> None:
        """Check the width."""
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"{type(self).__name__}.hidden must be at least 1, got {self.hidden}")

    def width(self, dim: int) -> int:
        """The width of the state in a model of width `dim`."""
        return dim if self.hidden is None else self.hidden


@dataclass(frozen=True, kw_only=True)
class Elman(RecurrentMixer):
    """h_t = f(W x_t + U h_{t-1} + b) (Elman 1990; Mikolov et al. 2010 with the sigmoid)."""

    activation: Literal["tanh", "sigmoid", "relu"] = "tanh"

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return ElmanModule(dim, self)


@dataclass(frozen=True, kw_only=True)
class LSTM(RecurrentMixer):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with Gers' forget gate), gates in the order i, f, g, o.

    i, f = sigmoid(W x + U h + b), g = tanh(.), c = f c + i g, o = sigmoid(.), h = o tanh(c).

    Attributes:
        peepholes: i and f also read c_{t-1}, and o reads c_t, each cell its own (Graves 2013, arXiv:1308.0850).
        layer_norm: gates are LN(U h) + LN(W x) + b, and h = o tanh(LN(c)) (Ba et al. 2016, arXiv:1607.06450).
        forget_bias: where the forget gate's bias begins.
    """

    peepholes: bool = False
    layer_norm: bool = False
    forget_bias: float = 1.0

    def validate(self) -> None:
        """Check that the options have been published together."""
        super().validate()
        if self.peepholes and self.layer_norm:
            raise ValueError("LSTM takes peepholes or layer_norm: with both, nobody has said where the norms stand")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return LSTMModule(dim, self)


@dataclass(frozen=True, kw_only=True)
class GRU(RecurrentMixer):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), gates in the order r, z, n.

    r, z = sigmoid(W x + U h + b), h = z h + (1 - z) n. The candidate n is tanh(W x + U (r * h)) with reset="before"
    (the paper), or tanh(W x + r * (U h + b)) with reset="after" (cuDNN, torch, Keras' reset_after).
    """

    reset: Literal["before", "after"] = "before"

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return GRUModule(dim, self)


class RecurrentModule(nn.Module):
    """What the three share: `input` for all tokens at once, then one step a token. Tap: `state` (batch, time, hidden).

    Where no segment begins in the middle, and torch has a kernel for the kind, that kernel runs instead of the loop.
    """

    states: tuple[str, ...] = ("state",)

    def __init__(self, dim: int, spec: RecurrentMixer, gates: int, recurrent_bias: bool = False) -> None:
        super().__init__()
        self.spec: Any = spec
        self.width = spec.width(dim)
        self.input = nn.Linear(dim, gates * self.width)
        self.recurrent = nn.Linear(self.width, gates * self.width, bias=recurrent_bias)
        self.state = Tap()
        self.cell = Tap()
        self.output = nn.Linear(self.width, dim) if self.width != dim else None

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as torch does: uniform within +- width^-0.5."""
        bound = self.width**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The state before the first token: zeros, whatever `capacity`."""
        return StateCache(**{name: torch.zeros(batch, self.width, dtype=dtype, device=device) for name in self.states})

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        zeros = x.new_zeros(len(x), self.width)
        state: State = tuple(zeros if cache is None else cache[name].to(x.dtype) for name in self.states)
        fused = None if begins is not None else self.fused(x, state)
        if fused is None:
            keeps = None if begins is None else (~begins).to(x.dtype)[..., None].unbind(1)
            given, trail = self.project(x).unbind(1), []
            for step, present in enumerate(given):
                if keeps is not None:
                    state = tuple(part * keeps[step] for part in state)
                state = self.step(present, state)
                trail.append(state)
            out = torch.stack([each[0] for each in trail], 1)
            if len(self.states) > 1 and self.cell.listened:
                self.cell(torch.stack([each[1] for each in trail], 1))
        else:
            out, state = fused
        if cache is not None:
            for name, part in zip(self.states, state, strict=True):
                cache[name] = part
        out = self.state(out)
        result: Tensor = out if self.output is None else self.output(out)
        return result

    def project(self, x: Tensor) -> Tensor:
        """What the gates get from the inputs, (batch, time, gates * width)."""
        out: Tensor = self.input(x)
        return out

    def step(self, given: Tensor, state: State) -> State:
        """The state after one token."""
        raise NotImplementedError(f"{type(self).__name__} does not say its step")

    def fused(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Outputs and state by torch's kernel; None where it has none."""
        return None

    def _weights(self) -> list[Tensor]:
        bias = self.recurrent.bias
        if bias is None:
            bias = torch.zeros_like(self.input.bias)
        return [self.input.weight, self.recurrent.weight, self.input.bias, bias]


class ElmanModule(RecurrentModule):
    """The module of `Elman`."""

    def __init__(self, dim: int, spec: Elman) -> None:
        super().__init__(dim, spec, gates=1)
        if self.input.weight.device.type != "meta":
            self.initialize(Context())
        self.activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}[spec.activation]

    def step(self, given: Tensor, state: State) -> State:
        """The state after one token."""
        return (self.activation(given + self.recurrent(state[0])),)

    def fused(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Outputs and state by torch's kernel for tanh and relu."""
        kernel = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}.get(self.spec.activation)
        if kernel is None:
            return None
        out, last = kernel(x, state[0][None], self._weights(), True, 1, 0.0, self.training, False, True)
        return out, (last[0],)


class LSTMModule(RecurrentModule):
    """The module of `LSTM`; its cells are the second state. Tap: `cell` (batch, time, hidden), to be recorded only."""

    states = ("state", "cell")

    def __init__(self, dim: int, spec: LSTM) -> None:
        super().__init__(dim, spec, gates=4)
        self.peephole = nn.Parameter(torch.zeros(3, self.width)) if spec.peepholes else None  # i, f, o
        if spec.layer_norm:
            self.input_norm = nn.LayerNorm(4 * self.width, bias=False)
            self.recurrent_norm = nn.LayerNorm(4 * self.width, bias=False)
            self.cell_norm = nn.LayerNorm(self.width)
            # the norm takes a constant away from W x + b, so the bias stands behind it
            self.gate_bias = nn.Parameter(torch.zeros(4 * self.width))
        if self.input.weight.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as torch does, with the forget gate's bias where the spec says, peepholes at zero, gains at one."""
        bound = self.width**-0.5
        for linear in (self.input, self.recurrent, *([] if self.output is None else [self.output])):
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        bias = self.gate_bias if self.spec.layer_norm else self.input.bias
        bias.zero_()
        bias[self.width : 2 * self.width] = self.spec.forget_bias
        if self.peephole is not None:
            self.peephole.zero_()

    def project(self, x: Tensor) -> Tensor:
        """What the gates get from the inputs."""
        if not self.spec.layer_norm:
            return super().project(x)
        out: Tensor = self.input_norm(F.linear(x, self.input.weight)) + self.gate_bias
        return out

    def step(self, given: Tensor, state: State) -> State:
        """The state after one token."""
        hidden, cell = state
        back = self.recurrent(hidden)
        if self.spec.layer_norm:
            back = self.recurrent_norm(back)
        enter, forget, candidate, leave = (given + back).chunk(4, -1)
        if self.peephole is not None:
            enter, forget = enter + self.peephole[0] * cell, forget + self.peephole[1] * cell
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
        if self.peephole is not None:
            leave = leave + self.peephole[2] * cell
        shown = self.cell_norm(cell) if self.spec.layer_norm else cell
        return torch.sigmoid(leave) * torch.tanh(shown), cell

    def fused(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Outputs and state by torch's kernel, where nothing but the plain LSTM is asked for."""
        if self.peephole is not None or self.spec.layer_norm or self.cell.listened:
            return None
        before = [part[None] for part in state]
        out, last, cell = torch.lstm(x, before, self._weights(), True, 1, 0.0, self.training, False, True)
        return out, (last[0], cell[0])


class GRUModule(RecurrentModule):
    """The module of `GRU`."""

    def __init__(self, dim: int, spec: GRU) -> None:
        super().__init__(dim, spec, gates=3, recurrent_bias=spec.reset == "after")
        if self.input.weight.device.type != "meta":
            self.initialize(Context())

    def step(self, given: Tensor, state: State) -> State:
        """The state after one token."""
        (hidden,) = state
        if self.spec.reset == "after":
            back = self.recurrent(hidden).chunk(3, -1)
            reset, keep, candidate = given.chunk(3, -1)
            reset, keep = torch.sigmoid(reset + back[0]), torch.sigmoid(keep + back[1])
            new = torch.tanh(candidate + reset * back[2])
        else:
            gates = self.recurrent.weight[: 2 * self.width], self.recurrent.weight[2 * self.width :]
            reset, keep = torch.sigmoid(given[:, : 2 * self.width] + F.linear(hidden, gates[0])).chunk(2, -1)
            new = torch.tanh(given[:, 2 * self.width :] + F.linear(reset * hidden, gates[1]))
        return (keep * hidden + (1 - keep) * new,)

    def fused(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Outputs and state by torch's kernel, which has the second form only."""
        if self.spec.reset == "before":
            return None
        out, last = torch.gru(x, state[0][None], self._weights(), True, 1, 0.0, self.training, False, True)
        return out, (last[0],)
