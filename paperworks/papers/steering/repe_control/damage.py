"""What steering costs: how likely the unsteered model finds what was written under a vector, and a warning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SteeringDamage(UserWarning):
    """A steering strength under which a model no longer writes text."""


@dataclass(frozen=True)
class Damage:
    """Perplexity, under the unsteered model, of what was written with and without steering."""

    steered: float
    unsteered: float

    @property
    def ratio(self) -> float:
        """How many times more surprising steered text is."""
        return self.steered / self.unsteered


@torch.no_grad()
def perplexity_of(model: nn.Module, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> float:
    """Exp of the mean loss, in nats a token, of continuations after their prompts, all tokens counting alike.

    Raises:
        ValueError: lists of unequal length, an empty prompt, or nothing but empty continuations.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"each continuation needs its prompt, got {len(continuations)} and {len(prompts)}")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for prompt, written in zip(prompts, continuations, strict=True):
        if not len(prompt):
            raise ValueError("a prompt is empty: the first token written has nothing before it")
        if not len(written):
            continue
        row = torch.tensor([[*prompt, *written]], device=device)
        output = model(row[:, :-1])
        logits: Tensor = output if isinstance(output, Tensor) else output.logits  # of other libraries
        chances = logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        total -= float(chances.gather(1, row[0, len(prompt) :, None]).sum())
        count += len(written)
    if not count:
        raise ValueError("every continuation is empty: nothing was written to measure")
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def damage(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    steered: Sequence[Sequence[int]],
    unsteered: Sequence[Sequence[int]],
    *,
    most: float = 10.0,
) -> Damage:
    """Measure texts written with and without steering, outside the steering's context, and warn of destroyed ones.

    Args:
        model: as it is without steering.
        prompts: token ids; steered, unsteered: what was written after each.
        most: warn when steered text is this many times as surprising.

    Warns:
        SteeringDamage: with both perplexities, when their ratio is above `most`.
    """
    found = Damage(perplexity_of(model, prompts, steered), perplexity_of(model, prompts, unsteered))
    if found.ratio > most:
        warnings.warn(
            f"this steering destroys the text: its perplexity is {found.steered:.3g}, more than {most:g} times the "
            f"{found.unsteered:.3g} of unsteered text; steer with less strength, or in fewer layers",
            SteeringDamage,
            stacklevel=2,
        )
    return found
