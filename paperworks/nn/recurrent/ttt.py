"""TTT layers: the hidden state is a model that is trained on the sequence, while it reads (Sun et al. 2024,
arXiv:2407.04620).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.initialization import Context
from paperworks.core.linear import residual_output
from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.position.rotary import RoPE
from paperworks.nn.recurrent.documents import Documents
from paperworks.nn.recurrent.recurrence import CausalConvolution, StateCache, state_of
from paperworks.nn.recurrent.ttt_inner import EPS, InnerNorm, State, fresh_state, inner_step, inner_weights
from paperworks.nn.tap import Tap

BASE_RATES = {"linear": 1.0, "mlp": 0.1}  # Section 2.7


@dataclass(frozen=True, kw_only=True)
class TTT(Mixer):
    """W_t = W - eta_t sum over s <= t of eta_s grad l(W; k_s, v_s), z_t = f(q_t; W_t); W moves on every `mini_batch`.

    l(W; k, v) = |f(k; W) - v|^2 / 2 with f(x; W) = x + norm(x W + b), or two layers with a GELU between. So each head
    learns, by gradient descent inside the forward pass, to say values of keys; queries ask what it has learned. The
    first W, the norm, the rates and the projections are trained as usual, through those gradients.

    Attributes:
        heads: inner models side by side, each on its share of the channels.
        inner: "linear" (TTT-Linear) or "mlp" (TTT-MLP, four times as wide inside).
        mini_batch: tokens whose gradients are all taken at the same W (b).
        base_rate: the largest inner rate a token can ask for; None is the paper's, 1 for "linear", 0.1 for "mlp".
        norm: whether f has its norm and residual (Table 1). Without them and with one mini-batch for all tokens the
            layer is linear attention with a learned first state and learned weights of tokens (Theorem 1).
        backbone: "mamba", one projection for queries and keys with a convolution each, and a gate; or "transformer".
        width: tokens those convolutions see.
    """

    heads: int = 4
    inner: Literal["linear", "mlp"] = "linear"
    mini_batch: int = 16
    base_rate: float | None = None
    norm: bool = True
    backbone: Literal["mamba", "transformer"] = "mamba"
    width: int = 4

    def validate(self) -> None:
        """Check the sizes."""
        for name in ("heads", "mini_batch", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"TTT.{name} must be at least 1, got {getattr(self, name)}")
        if self.base_rate is not None and self.base_rate <= 0:
            raise ValueError(f"TTT.base_rate must be above 0, got {self.base_rate}")

    def check(self, dim: int) -> None:
        """Raise `ValueError` if heads do not divide `dim` into an even number of channels."""
        if dim % self.heads or dim // self.heads % 2:
            raise ValueError(
                f"TTT.heads ({self.heads}) must divide dim ({dim}) into an even number of channels, which RoPE pairs"
            )

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return TTTModule(dim, self)


class TTTCache(StateCache):
    """W and b at the start of the mini-batch, the gradients summed since, tokens in it, windows of convolutions."""


class TTTModule(nn.Module):
    """The module of `TTT`. Taps: `rate` (batch, time, heads), inner rates; `heads` (batch, time, dim), f(q; W_t)."""

    def __init__(self, dim: int, spec: TTT) -> None:
        super().__init__()
        spec.check(dim)
        self.spec = spec
        self.size = dim // spec.heads
        mamba = spec.backbone == "mamba"
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = None if mamba else nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.query_convolution = CausalConvolution(dim, spec.width) if mamba else None
        self.key_convolution = CausalConvolution(dim, spec.width) if mamba else None
        self.gate = nn.Linear(dim, dim, bias=False) if mamba else None
        self.rate_of = nn.Linear(dim, spec.heads)
        self.place_rate = nn.Parameter(torch.empty(spec.mini_batch))
        self.inner_norm = InnerNorm(spec.heads, self.size) if spec.norm else None
        self.inner = nn.ParameterDict(inner_weights(spec.inner, spec.heads, self.size))
        self.rate = Tap()
        self.heads = Tap()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.output = residual_output(nn.Linear(dim, dim, bias=False))
        if self.place_rate.device.type != "meta":
            self.initialize(Context())

    @torch.no_grad()
    def initialize(self, context: Context) -> None:
        """Draw as the reference does: W from N(0, 0.02), b and corrections of places zero, the inner norm plain."""
        for name, parameter in self.inner.items():
            nn.init.zeros_(parameter) if name.startswith("b") else nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.rate_of.weight, std=0.02)
        for parameter in (self.place_rate, self.rate_of.bias):
            nn.init.zeros_(parameter)
        if self.inner_norm is not None:
            nn.init.ones_(self.inner_norm.gain)
            nn.init.zeros_(self.inner_norm.shift)
        for convolution in (self.query_convolution, self.key_convolution):
            if convolution is not None:
                convolution.reset_parameters()

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TTTCache:
        """The state before the first token; its size does not depend on `capacity`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        states = fresh_state(self._first(wide), batch)
        cache = TTTCache(place=torch.zeros(batch, dtype=torch.int64, device=device))
        for name, tensor in states.items():
            cache[name] = tensor.to(device).clone()
        if self.query_convolution is not None:
            for name in ("query", "key"):
                cache[name] = self.query_convolution.new_window(batch, dtype, device)
        return cache

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        cache, begins = state_of(placement), placement.begins()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        query, key = self._queries_and_keys(x, cache, begins)
        rate = self._rates(x).to(wide)
        parts = [part.unflatten(-1, (self.spec.heads, -1)).to(wide) for part in (query, key, self.value(x))]
        offset = None if cache is None else cache["place"]
        if begins is None and (offset is None or not offset.any()):
            out = self._plain(parts, rate, cache)
        else:
            out = self._laid_out(parts, rate, begins, cache)
        mixed = self.norm(self.heads(out.flatten(2)).to(x.dtype))
        if self.gate is not None:
            mixed = F.gelu(self.gate(x), approximate="tanh") * mixed
        result: Tensor = self.output(mixed)
        return result

    def _queries_and_keys(self, x: Tensor, cache: StateCache | None, begins: Tensor | None) -> tuple[Tensor, Tensor]:
        query = self.query(x)
        if self.query_convolution is None or self.key_convolution is None:
            assert self.key is not None
            return query, self.key(x)
        windows = (None, None) if cache is None else (cache["query"], cache["key"])
        key, key_window = self.key_convolution(query, windows[1], begins)
        query, query_window = self.query_convolution(query, windows[0], begins)
        if cache is not None:
            cache["query"], cache["key"] = query_window, key_window
        return query, key

    def _rates(self, x: Tensor) -> Float[Tensor, "batch time heads"]:
        """Base * sigmoid(theta x) / size: eta of each token and head."""
        base = BASE_RATES[self.spec.inner] if self.spec.base_rate is None else self.spec.base_rate
        out: Tensor = self.rate(base / self.size * torch.sigmoid(self.rate_of(x)))
        return out

    def _first(self, dtype: torch.dtype) -> State:
        return {name: parameter.to(dtype) for name, parameter in self.inner.items()}

    def _plain(self, parts: list[Tensor], rate: Tensor, cache: StateCache | None) -> Tensor:
        """Read one document a row, from the start of a mini-batch."""
        batch, time = rate.shape[:2]
        state = fresh_state(self._first(rate.dtype), batch) if cache is None else _state_in(cache, self.inner)
        size = self.spec.mini_batch
        places = torch.arange(time, device=rate.device) % size
        outputs = []
        for start in range(0, time, size):
            here = slice(start, start + size)
            whole = None if time - start >= size else torch.zeros(batch, dtype=torch.bool, device=rate.device)
            given = [part[:, here] for part in parts]
            out, state = self._mini_batch(given, rate[:, here], state, places[here], whole)
            outputs.append(out)
        if cache is not None:
            cache["place"] = torch.full((batch,), time % size, device=rate.device)
            for name, tensor in state.items():
                cache[name] = tensor
        return torch.cat(outputs, 1)

    def _laid_out(self, parts: list[Tensor], rate: Tensor, begins: Tensor | None, cache: StateCache | None) -> Tensor:
        """Read packed documents, and go on inside a mini-batch: one document a row, each at its own place in it."""
        if begins is None:
            begins = torch.zeros(rate.shape[:2], dtype=torch.bool, device=rate.device)
        documents = Documents(begins, None if cache is None else cache["place"])
        size = self.spec.mini_batch
        width = -(-documents.width // size) * size
        laid = [documents.spread(part, width) for part in parts]
        rates, filled = documents.spread(rate, width), documents.filled(width)  # a rate of 0 where there is no token
        state = fresh_state(self._first(rate.dtype), documents.count)
        if cache is not None:
            carried = _state_in(cache, self.inner)
            for name, fresh in state.items():
                opens = documents.opens.view(-1, *[1] * (fresh.dim() - 1))
                state[name] = torch.where(opens, fresh, carried[name][documents.row])
        places = torch.arange(size, device=rate.device)
        outputs = []
        for start in range(0, width, size):
            here = slice(start, start + size)
            given = [part[:, here] for part in laid]
            out, state = self._mini_batch(given, rates[:, here], state, places, filled[:, start + size - 1])
            outputs.append(out)
        if cache is not None:
            end = filled.long().mul(torch.arange(1, width + 1, device=rate.device)).amax(1)  # a document has no holes
            cache["place"] = end[documents.last] % size
            for name, tensor in state.items():
                cache[name] = tensor[documents.last]
        return documents.gather(torch.cat(outputs, 1))

    def _mini_batch(
        self,
        parts: list[Float[Tensor, "rows tokens heads size"]],
        rate: Float[Tensor, "rows tokens heads"],
        state: State,
        places: Int[Tensor, " tokens"],
        whole: Tensor | None,
    ) -> tuple[Float[Tensor, "rows tokens heads size"], State]:
        """What the inner models say to the queries, and their state; `whole`: rows that come to the end."""
        query, key, value = (part.transpose(1, 2) for part in parts)
        rope = RoPE(layout="interleaved")
        cos, sin = rope.table(places[None], rope.rotated(self.size), self.spec.mini_batch, query.dtype)
        query, key = rope.rotate(query, cos, sin), rope.rotate(key, cos, sin)
        at = torch.clamp(1.0 / (places + 1).to(rate.dtype) + self.place_rate.to(rate.dtype)[places], min=0.0)
        out, state = inner_step(query, key, value, rate.transpose(1, 2), at, state, self.inner_norm, whole)
        return out.transpose(1, 2), state


def _state_in(cache: StateCache, names: nn.ParameterDict) -> State:
    return {key: tensor for key, tensor in cache.states.items() if key.split(".")[0] in names}
