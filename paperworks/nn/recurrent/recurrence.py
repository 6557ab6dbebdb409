"""What recurrent mixers share: the token before, a causal convolution, and linear recurrences; segments kept apart."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from paperworks.nn.placement import MixerCache, Placement


class StateCache(MixerCache):
    """What a recurrent mixer carries on: named tensors (batch, ...), whatever the length of the sequence."""

    def __init__(self, **states: Tensor) -> None:
        self.states = states

    def __getitem__(self, name: str) -> Tensor:
        """One state."""
        return self.states[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Carry on with another state; no gradient reaches back beyond it."""
        self.states[name] = value.detach()

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.states = {name: state.index_select(0, rows) for name, state in self.states.items()}

    def bytes(self) -> int:
        """The memory held, in bytes."""
        return sum(state.nbytes for state in self.states.values())


def state_of(placement: Placement) -> StateCache | None:
    """The placement's cache as a recurrent mixer's. Raises `TypeError` for another mixer's cache."""
    if placement.cache is not None and not isinstance(placement.cache, StateCache):
        raise TypeError(f"a recurrent mixer was given a {type(placement.cache).__name__}: the cache is another model's")
    return placement.cache


def before(
    x: Float[Tensor, "batch time dim"],
    last: Float[Tensor, "batch dim"] | None,
    begins: Bool[Tensor, "batch time"] | None,
) -> Float[Tensor, "batch time dim"]:
    """Each token's predecessor: `last` before the first one, zeros where a segment begins."""
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
    shifted = torch.cat((first, x[:, :-1]), 1)
    return shifted if begins is None else shifted.masked_fill(begins[..., None], 0.0)


class CausalConvolution(nn.Module):
    """y_t = bias + sum_j weight_j x_{t-j}, channel by channel, over `width` tokens of one segment.

    Weights are (dim, 1, width), the last one for the present token, as torch.nn.Conv1d with groups=dim has them.
    """

    def __init__(self, dim: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution must be at least 1 wide, got {width}")
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, 1, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{self.weight.shape[0]}, width={self.width}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        """Draw as torch.nn.Conv1d does: uniform within +- width^-0.5."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def new_window(self, batch: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch window dim"]:
        """The inputs before the first token: zeros (batch, width - 1, dim)."""
        return torch.zeros(batch, self.width - 1, self.weight.shape[0], dtype=dtype, device=device)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        window: Float[Tensor, "batch window dim"] | None = None,
        begins: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch window dim"]]:
        """The outputs, and the window that the next tokens go on from."""
        reach = self.width - 1
        if window is None:
            window = self.new_window(x.shape[0], x.dtype, x.device)
        joined = torch.cat((window.to(x.dtype), x), 1)
        end = joined[:, joined.shape[1] - reach :]
        if begins is None:
            out = functional.conv1d(joined.transpose(1, 2), self.weight, self.bias, groups=x.shape[-1]).transpose(1, 2)
            return out, end
        out = x * self.weight[:, 0, -1]
        same = torch.ones_like(begins)
        for back in range(1, reach + 1):
            # x_{t-back} counts while none of the tokens t-back+1 .. t begins a segment
            same = same & ~functional.pad(begins, (back - 1, 0))[:, : begins.shape[1]]
            out = (
                out + joined[:, reach - back : joined.shape[1] - back] * same[..., None] * self.weight[:, 0, -1 - back]
            )
        if self.bias is not None:
            out = out + self.bias
        # what lies before the last beginning must not be seen by the next tokens either
        keep = torch.ones_like(end[..., 0], dtype=torch.bool)
        flags = functional.pad(begins, (reach, 0))[:, begins.shape[1] :]
        for place in range(reach):
            keep[:, place] = ~flags[:, place + 1 :].any(1)
        return out, end * keep[..., None]


def linear_recurrence(
    decay: Float[Tensor, "batch time *state"],
    drive: Float[Tensor, "batch time *state"],
    initial: Float[Tensor, "*batch_and_state"] | None = None,
) -> Float[Tensor, "batch time *state"]:
    """Every h_t = decay_t * h_{t-1} + drive_t, elementwise, h_{-1} = `initial` or 0.

    One step after the other on a CPU, by doubling (log2 time passes) elsewhere; both give the derivatives of all
    three arguments. To begin anew at a token, set its decay to 0.
    """
    if decay.shape != drive.shape:
        raise ValueError(f"decay {tuple(decay.shape)} and drive {tuple(drive.shape)} must have one shape")
    if initial is None:
        initial = torch.zeros_like(drive[:, 0])
    if drive.device.type != "cpu":
        return doubling_recurrence(decay, drive, initial)
    states: Tensor = _Recurrence.apply(decay, drive, initial)  # type: ignore[no-untyped-call]
    return states


def doubling_recurrence(
    decay: Float[Tensor, "batch time *state"],
    drive: Float[Tensor, "batch time *state"],
    initial: Float[Tensor, "*batch_and_state"],
) -> Float[Tensor, "batch time *state"]:
    """The same by Hillis and Steele's scan of (a, b) o (a', b') = (a a', a' b + b'): log2(time) passes."""
    states = torch.cat(((decay[:, :1] * initial[:, None] + drive[:, :1]), drive[:, 1:]), 1)
    factors, reach, time = decay, 1, drive.shape[1]
    while reach < time:
        states = torch.cat((states[:, :reach], factors[:, reach:] * states[:, :-reach] + states[:, reach:]), 1)
        factors = torch.cat((factors[:, :reach], factors[:, reach:] * factors[:, :-reach]), 1)
        reach *= 2
    return states


class _Recurrence(torch.autograd.Function):
    """g_t = dh_t + a*_{t+1} g_{t+1}; the gradients are g_t (drive), g_t h*_{t-1} (decay), a*_0 g_0 (initial)."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, initial: Tensor) -> Tensor:
        # time first: each step then reads and writes contiguous memory
        factors = decay.transpose(0, 1).contiguous()
        states = drive.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        state = initial
        for factor, new in zip(factors.unbind(0), states.unbind(0), strict=True):
            state = new.addcmul_(factor, state)
        ctx.save_for_backward(factors, states, initial)
        return states.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors, states, initial = ctx.saved_tensors
        gradient = above[0].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        rows, decays = gradient.unbind(0), factors.unbind(0)
        for step in range(len(rows) - 2, -1, -1):
            rows[step].addcmul_(decays[step + 1].conj(), rows[step + 1])
        to_decay = gradient * torch.cat((initial[None], states[:-1])).conj()
        return to_decay.transpose(0, 1), gradient.transpose(0, 1), decays[0].conj() * rows[0]
