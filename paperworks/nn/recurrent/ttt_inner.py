"""The inner loop of TTT layers: one mini-batch of gradient descent on the hidden state, in its dual form."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.linear import undecayed

EPS = 1e-6  # of both norms, inside f and after the heads

# "w1", "b1" (and "w2", "b2"), each (rows, heads, in, out) or (rows, heads, 1, out), at the start of the mini-batch;
# "w1.sum" and so on: the sum of eta times the gradient over the tokens of the mini-batch seen so far.
State = dict[str, Tensor]


def inner_weights(inner: str, heads: int, size: int) -> dict[str, nn.Parameter]:
    """The parameters of the first inner model, not yet drawn: one layer, or two with four times the width."""
    widths = (size, size) if inner == "linear" else (size, 4 * size, size)
    made: dict[str, nn.Parameter] = {}
    for layer, (before, after) in enumerate(pairwise(widths), 1):
        made[f"w{layer}"] = nn.Parameter(torch.empty(heads, before, after))
        made[f"b{layer}"] = undecayed(nn.Parameter(torch.empty(heads, 1, after)))
    return made


def fresh_state(first: State, rows: int) -> State:
    """The state of so many rows before the first token."""
    state = {name: weight.expand(rows, *weight.shape) for name, weight in first.items()}
    return state | {f"{name}.sum": torch.zeros_like(weight) for name, weight in state.items()}


class InnerNorm(nn.Module):
    """The norm inside f, by head: f(x) = x + gain * (Z - mean) / std + shift of Z = X W + b."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.gain = undecayed(nn.Parameter(torch.ones(heads, 1, size)))
        self.shift = undecayed(nn.Parameter(torch.zeros(heads, 1, size)))

    def forward(self, z: Float[Tensor, "rows heads tokens size"]) -> Float[Tensor, "rows heads tokens size"]:
        """Gain * (z - mean) / std + shift."""
        return F.layer_norm(z, z.shape[-1:], eps=EPS) * self.gain.to(z.dtype) + self.shift.to(z.dtype)

    def loss_gradient(self, z: Tensor, target: Tensor) -> Float[Tensor, "rows heads tokens size"]:
        """The gradient of |norm(z) - target|^2 / 2 with respect to z, itself differentiable."""
        gain, shift = self.gain.to(z.dtype), self.shift.to(z.dtype)
        variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + EPS)
        normal = (z - mean) * inverse
        slope = (gain * normal + shift - target) * gain
        centred = slope - slope.mean(-1, keepdim=True)
        return (centred - normal * (slope * normal).mean(-1, keepdim=True)) * inverse


def inner_step(
    query: Float[Tensor, "rows heads tokens size"],
    key: Float[Tensor, "rows heads tokens size"],
    value: Float[Tensor, "rows heads tokens size"],
    rate: Float[Tensor, "rows heads tokens"],
    place_rate: Float[Tensor, " tokens"],
    state: State,
    norm: InnerNorm | None,
    whole: Bool[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "rows heads tokens size"], State]:
    """f(q_t; W_t) for tokens of one mini-batch, and the state after them.

    W_t = W - place_rate_t (sum so far + sum over s <= t of rate_s grad_s), every gradient at W, without making any W_t:
    for Z = X W + b with gradient G, Q W_t = Q W - place_rate_t (Q sum + (rate tril(Q X^T)) G), and so for b.

    Args:
        query, key, value: of the tokens; the model learns f(key) = value.
        rate: eta of each token; 0 leaves a token out.
        place_rate: of each place in the mini-batch.
        state: weights at its start, and sums of the tokens before these.
        norm: that of f, with which f adds its input; without, f(x) = x W + b.
        whole: rows whose mini-batch ends with these tokens, so that W moves; None means all.
    """
    layers = range(1, len(state) // 4 + 1)
    inputs, summed = [key], []
    for layer in layers:
        summed.append(inputs[-1] @ state[f"w{layer}"] + state[f"b{layer}"])
        if layer < len(layers):
            inputs.append(F.gelu(summed[-1], approximate="tanh"))
    # what the layers themselves are to say: the value, without the key that f adds
    gradients = [summed[-1] - value if norm is None else norm.loss_gradient(summed[-1], value - key)]
    for layer in reversed(layers[1:]):
        back = gradients[0] @ state[f"w{layer}"].transpose(-1, -2)
        gradients.insert(0, back * gelu_slope(summed[layer - 2]))

    at, asked = place_rate[:, None], query
    new: State = {}
    for layer, given, gradient in zip(layers, inputs, gradients, strict=True):
        weight, bias = state[f"w{layer}"], state[f"b{layer}"]
        earlier, earlier_bias = state[f"w{layer}.sum"], state[f"b{layer}.sum"]
        weighted = rate[..., None] * gradient
        scores = (asked @ given.transpose(-1, -2)).tril()
        moved = asked @ earlier + scores @ weighted + earlier_bias + weighted.cumsum(-2)
        answer = asked @ weight + bias - at * moved
        new[f"w{layer}.sum"] = earlier + given.transpose(-1, -2) @ weighted
        new[f"b{layer}.sum"] = earlier_bias + weighted.sum(-2, keepdim=True)
        new[f"w{layer}"] = weight - place_rate[-1] * new[f"w{layer}.sum"]
        new[f"b{layer}"] = bias - place_rate[-1] * new[f"b{layer}.sum"]
        asked = F.gelu(answer, approximate="tanh") if layer < len(layers) else answer
    return asked if norm is None else query + norm(asked), _ended(state, new, whole)


def _ended(old: State, new: State, whole: Tensor | None) -> State:
    """Move W and empty the sums where the mini-batch is over; elsewhere keep W and the sums."""
    ended: State = {}
    for name, tensor in new.items():
        over = torch.zeros_like(tensor) if name.endswith(".sum") else tensor
        if whole is None:
            ended[name] = over
        else:
            goes_on = tensor if name.endswith(".sum") else old[name]
            ended[name] = torch.where(whole.view(-1, *[1] * (tensor.dim() - 1)), over, goes_on)
    return ended


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of GELU's tanh form."""
    outer = math.sqrt(2 / math.pi)
    bent = torch.tanh(outer * (x + 0.044715 * x**3))
    return 0.5 * (1 + bent) + 0.5 * x * (1 - bent**2) * outer * (1 + 3 * 0.044715 * x**2)
