"""What an attention head does, measured on repeated sequences (Olsson et al. 2022, "In-context Learning and Induction
Heads", transformer-circuits.pub/2022/in-context-learning-and-induction-heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.interpret.taps import edit, record


def attention_to(
    pattern: Float[Tensor, "batch heads time time"], back: int, first: int | None = None
) -> Float[Tensor, " heads"]:
    """Each head's mean attention from position t to t - back, over the batch and t = first .. time - 1.

    Args:
        pattern: recorded from `blocks.N.mixer.pattern`.
        back: how many positions back, 0 or more.
        first: the first t; None is `back`, the first that has such a position.
    """
    time = pattern.shape[-1]
    start = back if first is None else first
    if pattern.dim() != 4 or pattern.shape[-2] != time:
        raise ValueError(f"pattern must be (batch, heads, time, time) of whole sequences, got {tuple(pattern.shape)}")
    if not 0 <= back <= start < time:
        raise ValueError(f"no position from {start} to {time - 1} has one {back} before it in a sequence of {time}")
    here = torch.arange(start, time, device=pattern.device)
    return pattern[:, :, here, here - back].mean((0, 2))


def prefix_matching(
    pattern: Float[Tensor, "batch heads time time"], period: int, start: int = 0
) -> Float[Tensor, " heads"]:
    """The mean attention to the token AFTER the previous occurrence: from t to t - period + 1.

    Over the second copy and later ones of a block of `period` tokens that begins at position `start`. 1 for a perfect
    induction head, mean 1 / (t + 1) for uniform attention.
    """
    return attention_to(pattern, period - 1, start + period)


def previous_token(pattern: Float[Tensor, "batch heads time time"]) -> Float[Tensor, " heads"]:
    """The mean attention to the token before."""
    return attention_to(pattern, 1)


def duplicate_token(
    pattern: Float[Tensor, "batch heads time time"], period: int, start: int = 0
) -> Float[Tensor, " heads"]:
    """The mean attention to the same token's previous occurrence: from t to t - period."""
    return attention_to(pattern, period, start + period)


def token_losses(
    logits: Float[Tensor, "batch time vocab"], tokens: Int[Tensor, "batch time"]
) -> Float[Tensor, " predicted"]:
    """The mean loss in nats of predicting token t + 1 at each position t = 0 .. time - 2."""
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} must agree in batch and time")
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -chosen.mean(0)


def in_context_score(losses: Float[Tensor, " predicted"], early: int, late: int) -> float:
    """The loss at a late position minus that at an early one (the paper's 500 and 50); context makes it < 0."""
    if not 0 <= early < late < len(losses):
        raise ValueError(f"early ({early}) must come before late ({late}), both among {len(losses)} predictions")
    return (losses[late] - losses[early]).item()


@contextmanager
def frozen_patterns(model: nn.Module, tokens: Int[Tensor, "batch time"]) -> Iterator[nn.Module]:
    """Keep every attention pattern as it is on `tokens`, whatever is edited inside the context.

    So an ablation shows the direct effect of a head's output, not that later heads look elsewhere (the paper's
    pattern-preserving ablation).
    """
    with torch.no_grad(), record(model, "*.pattern") as seen:
        model(tokens)
    kept: dict[str, Any] = dict(seen)
    with edit(model, {path: (lambda pattern, path=path: kept[path]) for path in kept}):  # type: ignore[misc]
        yield model
