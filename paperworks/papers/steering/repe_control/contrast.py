"""Contrast vectors: what an instruction changes in these very tokens, added to the run without it.

The input-dependent control of representation engineering (Zou et al. 2023, arXiv:2310.01405).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.taps import edit, record

Tokens = Sequence[int]


@torch.no_grad()
def contrast_vectors(
    model: nn.Module, positive: Tokens, negative: Tokens, shared: int, targets: Sequence[str]
) -> dict[str, Float[Tensor, "shared dim"]]:
    """Contrast vectors v = R+ - R- at the last `shared` tokens, which both sides have in common, for each module.

    Args:
        model: any module that takes tokens (batch, time).
        positive, negative: the same text under opposite instructions, which may differ in length.
        shared: how many tokens at the end are the text itself.
        targets: glob patterns over module paths whose outputs are (batch, time, dim).

    Raises:
        ValueError: when the last `shared` tokens differ, or are more than there are.
    """
    if not 1 <= shared <= min(len(positive), len(negative)):
        raise ValueError(f"shared counts common last tokens: 1 to {min(len(positive), len(negative))}, got {shared}")
    if list(positive[-shared:]) != list(negative[-shared:]):
        raise ValueError(f"the last {shared} tokens of both sides must be the same text; encode text and prompt apart")
    device = next(model.parameters()).device
    ends = []
    for side in (positive, negative):
        with record(model, list(targets)) as seen:
            model(torch.tensor([list(side)], device=device))
        ends.append({path: value[0, -shared:] for path, value in seen.items()})
    return {path: ends[0][path] - ends[1][path] for path in ends[0]}


def add_at_end(
    model: nn.Module, vectors: Mapping[str, Float[Tensor, "shared dim"]], strength: float = 1.0
) -> AbstractContextManager[nn.Module]:
    """Add strength * v to the last tokens of each module's output, inside the context: the third of the three passes.

    Raises:
        ValueError: at a forward pass over fewer tokens than the vectors have.
    """

    def change(path: str, vector: Tensor) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            if x.shape[-2] < len(vector):
                raise ValueError(f"{path} sees {x.shape[-2]} tokens, the contrast vectors stand at {len(vector)}")
            moved = x.clone()
            moved[..., -len(vector) :, :] += strength * vector.to(x)
            return moved

        return add

    return edit(model, {path: change(path, vector) for path, vector in vectors.items()})
