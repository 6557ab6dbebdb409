"""Dynamic evaluation: a model that goes on learning from the text it is tested on (Mikolov et al. 2010)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.nn import Placement
from paperworks.train.loop import fit
from paperworks.train.optim.sgd import SGD
from paperworks.train.settings import Settings
from paperworks.train.streams import Streams


def stream_log_probabilities(
    model: nn.Module, tokens: Int[Tensor, " time"], *, length: int = 500
) -> Float[Tensor, " scored"]:
    """Log p of every token but the first, given all before it; the state is carried through the whole text.

    length: tokens read at once, which changes nothing but memory.
    """
    scored: list[Tensor] = []
    streams = Streams(tokens, batch=1, length=length)
    with torch.no_grad(), evaluating(model):
        for batch in streams:
            _scored(model, streams, batch, scored)
    return torch.cat(scored)


def dynamic_log_probabilities(
    model: nn.Module, tokens: Int[Tensor, " time"], *, lr: float = 0.1, length: int = 1, clip: float | None = None
) -> Float[Tensor, " scored"]:
    """Log p of every token but the first from a copy of `model` that learns from each chunk once it is scored.

    The chunk of `length` tokens is scored with the weights learned from those before it; then one step of plain
    gradient descent is taken on its summed loss, w -= lr * d(-log p(chunk)) / dw. `length=1` is the paper's form, with
    lr = 0.1 as in training. The given model stays as it is.

    Raises ValueError for fewer than two tokens, or where the model carries no state (see `Streams`).
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens has {len(tokens)}; at least 2 are needed, for the first one is given")
    learner, scored = copy.deepcopy(model), list[Tensor]()
    streams = Streams(tokens, batch=1, length=length)

    def loss(each: nn.Module, batch: Any) -> Tensor:
        return _scored(each, streams, batch, scored)

    settings = Settings(
        steps=len(streams),
        lr=lr,
        schedule="constant",
        warmup=0,
        optimizer=SGD(),
        clip=clip,
        seed=None,
        save_every=None,
        log_every=len(streams),
        progress=False,
    )
    learner.eval()
    learner.training = True  # so that the loop leaves its parts alone: nothing is dropped, no statistics are moved
    fit(learner, loss, streams, settings)
    return torch.cat(scored)


def _scored(model: nn.Module, streams: Streams, batch: Any, scored: list[Tensor]) -> Float[Tensor, ""]:
    """Append log p of each target, and return minus their sum."""
    logits = model(batch["tokens"], Placement(cache=streams.carried(model)))
    logs = logits.double().log_softmax(-1).gather(-1, batch["targets"][..., None])
    scored.append(logs.detach().flatten())
    out: Tensor = -logs.sum().to(logits.dtype)
    return out
