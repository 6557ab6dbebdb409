"""Long texts read in order: truncated backpropagation through time that carries the state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.nn import Cache, Placement
from paperworks.nn.recurrent.recurrence import StateCache
from paperworks.train.losses import next_token_loss

Batch = dict[str, Tensor]


class Streams:
    """Parallel streams of one text, chunk by chunk, and the loss that goes on from where the last chunk ended.

    The text is cut into `batch` streams of equal length (the rest of it is left out), and chunk k is tokens
    k * length to (k + 1) * length of every stream. Values pass from chunk to chunk, gradients do not: the model that
    predicts chunk k has seen all before it, and learns from `length` tokens back (Mikolov 2010, Graves 2013). At the
    beginning of each epoch the state is empty again.

        streams = Streams(tokens, batch=50, length=50)
        train.fit(model, streams.loss, streams, settings)
        reading = Streams(held_out, batch=1, length=500)
        train.evaluate(model, reading.loss, reading)

    Place and state are part of a checkpoint, so that a resumed run goes on bit for bit. One object serves one model at
    a time, in one process.
    """

    def __init__(self, tokens: Int[Tensor, " text"], *, batch: int, length: int) -> None:
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(f"tokens must be one text of integer ids, got {tokens.dtype} {tuple(tokens.shape)}")
        for name, value in (("batch", batch), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        span = (len(tokens) - 1) // batch
        if span < 1:
            raise ValueError(f"a text of {len(tokens)} tokens gives no {batch} streams; take fewer, or a longer text")
        self.length, self.span = length, span
        starts = span * torch.arange(batch)[:, None]
        self.rows = tokens[starts + torch.arange(span + 1)]
        self.chunk = 0
        self.cache: Cache | None = None
        self._saved: dict[str, Any] | None = None

    def __len__(self) -> int:
        return -(-self.span // self.length)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the chunks that are left of this epoch; the last one of all may be shorter."""
        while True:
            if self.chunk == 0:
                self.cache, self._saved = None, None
            start = self.chunk * self.length
            seen = self.rows[:, start : start + self.length + 1]
            last = self.chunk + 1 == len(self)
            self.chunk = 0 if last else self.chunk + 1  # before the chunk is read: nobody may come back after the last
            yield {"tokens": seen[:, :-1], "targets": seen[:, 1:]}
            if last:
                return

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Sum of -log p(next token), number of tokens), given the state after the chunk before.

        model: a `DecoderModel`, all of whose mixers carry a state of fixed size (recurrent, state-space).
        Raises ValueError for another, whose cache would grow with the text and keep its gradients.
        """
        carried = self.carried(model)
        return next_token_loss(lambda tokens: model(tokens, Placement(cache=carried)), batch)  # type: ignore[arg-type]

    def carried(self, model: nn.Module) -> Cache:
        """Cache that the next chunk is read with. Raises ValueError as `loss` does.

        Its states are contiguous copies, whether a chunk has just left them or a checkpoint: a matrix product of the
        same numbers takes another path, with another rounding, where the memory layout is another.
        """
        if self.cache is None:
            self.cache = self._opened(model)
        for layer in self.cache.layers:
            assert isinstance(layer, StateCache)
            for name, state in layer.states.items():
                layer[name] = state.clone(memory_format=torch.contiguous_format)
        return self.cache

    def _opened(self, model: nn.Module) -> Cache:
        cache: Cache = model.new_cache(len(self.rows), self.span)  # type: ignore[operator]
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, StateCache):
                raise ValueError(
                    f"block {index} remembers in a {type(layer).__name__}, which grows with the text; Streams carries "
                    "states of fixed size: take recurrent or state-space mixers, or windows that stand for themselves"
                )
        if self._saved is not None:
            cache.length = self._saved["length"]
            for layer, states in zip(cache.layers, self._saved["states"], strict=True):
                assert isinstance(layer, StateCache)
                for name, state in states.items():
                    layer[name] = state.to(layer[name])
            self._saved = None
        return cache

    def state_dict(self) -> dict[str, Any]:
        """Place in the epoch, and the state that the next chunk begins with."""
        if self.cache is None:
            return {"chunk": self.chunk, "saved": self._saved}
        states = [dict(layer.states) for layer in self.cache.layers if isinstance(layer, StateCache)]
        return {"chunk": self.chunk, "saved": {"length": self.cache.length, "states": states}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place: the next `iter` continues there."""
        self.chunk, self._saved, self.cache = state["chunk"], state["saved"], None
