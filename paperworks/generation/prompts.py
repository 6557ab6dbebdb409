"""Prompts of unequal length as one left-padded batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

Prompts = Int[Tensor, "batch time"] | Sequence[Sequence[int]] | Sequence[Tensor]


def left_pad(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (batch, time), padded on the left with 0, and segments (0 = padding), None if nothing is padded."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise ValueError(
                f"prompts must have shape (batch, time), got {tuple(prompts.shape)}; use prompt[None] for one"
            )
        rows = [prompts]
        if prompts.shape[1] and prompts.shape[0]:
            return prompts.to(device), None
    else:
        rows = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    if not rows or any(row.numel() == 0 for row in rows):
        raise ValueError(
            "a prompt is empty: the model needs a token to go on from, such as its beginning-of-text token"
        )
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        segments[index, longest - len(row) :] = 1
    return tokens.to(device), None if bool(segments.all()) else segments.to(device)
