"""Multiple choice by likelihood: the scoring rules of GPT-3 (Brown et al. 2020, arXiv:2005.14165, Section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.core.modes import evaluating
from paperworks.nn import Placement

Rule = Literal["sum", "mean", "unconditional"]


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """How likely each completion is.

    Attributes:
        total: (choices,) log p(completion | context), in nats.
        tokens: (choices,) tokens that a completion has; those of the context do not count.
        unconditional: (choices,) log p(completion | neutral context), or None where none was given.
    """

    total: Float[Tensor, " choices"]
    tokens: Float[Tensor, " choices"]
    unconditional: Float[Tensor, " choices"] | None = None

    def by(self, rule: Rule) -> Float[Tensor, " choices"]:
        """Scores of the choices by which they are compared.

        "sum": the log probability; "mean": that a token (most tasks of GPT-3); "unconditional": log of
        p(completion | context) / p(completion | "Answer: ") (ARC, OpenBookQA, RACE).
        Raises ValueError for an unknown rule, or "unconditional" where that was not measured.
        """
        if rule not in get_args(Rule):
            raise ValueError(unknown("scoring rule", str(rule), get_args(Rule)))
        if rule == "unconditional":
            if self.unconditional is None:
                raise ValueError('"unconditional" needs a neutral context: score_choices(..., neutral="Answer: ")')
            return self.total - self.unconditional
        return self.total / self.tokens if rule == "mean" else self.total

    def best(self, rule: Rule = "mean") -> int:
        """The index of the best completion."""
        return int(self.by(rule).argmax())


@torch.inference_mode()
def score_tokens(model: nn.Module, context: Sequence[int], completions: Sequence[Sequence[int]]) -> ChoiceScores:
    """Score completions of one context, all given as token ids.

    `model(tokens, segments=...)` gives logits. Raises ValueError for an empty context (a beginning-of-text token is
    enough) or an empty completion.
    """
    if not context:
        raise ValueError("context is empty: the first token of a completion needs one before it (beginning of text)")
    if not completions or not all(completions):
        raise ValueError("each of one or more completions needs at least one token")
    lengths = torch.tensor([len(completion) for completion in completions])
    width = len(context) + int(lengths.max())
    tokens = torch.zeros(len(completions), width, dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    for row, completion in enumerate(completions):
        whole = [*context, *completion]
        tokens[row, : len(whole)], segments[row, : len(whole)] = torch.tensor(whole), 1
    device = next(model.parameters()).device
    tokens, segments = tokens.to(device), segments.to(device)
    with evaluating(model):
        logits = model(tokens, Placement(segments=segments))[:, len(context) - 1 : -1]
    asked = tokens[:, len(context) :]
    logs = logits.double().log_softmax(-1).gather(2, asked[..., None])[..., 0]
    total = logs.masked_fill(segments[:, len(context) :] == 0, 0.0).sum(1).cpu()
    return ChoiceScores(total, lengths.double())


def score_choices(
    model: nn.Module, context: str, completions: Sequence[str], *, neutral: str | None = None
) -> ChoiceScores:
    """Score completions given as text; the model has a tokenizer.

    Context and completion are tokenized together, so that a space between them belongs to the completion's first
    token as it does in running text; white space at the end of the context goes over to the completion.

    Args:
        neutral: the context of the unconditional score, as "Answer: "; None measures none.

    Raises ValueError when text is empty, or where the tokens of the context change with what follows.
    """
    scores = [_score_text(model, context, completion) for completion in completions]
    total, tokens = torch.cat([each.total for each in scores]), torch.cat([each.tokens for each in scores])
    if neutral is None:
        return ChoiceScores(total, tokens)
    alone = torch.cat([_score_text(model, neutral, completion).total for completion in completions])
    return ChoiceScores(total, tokens, alone)


def _score_text(model: nn.Module, context: str, completion: str) -> ChoiceScores:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: score token ids with score_tokens")
    stripped = context.rstrip()
    given = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + context[len(stripped) :] + completion)
    if whole[: len(given)] != given:
        raise ValueError(
            f"the tokens of the context ending in {stripped[-20:]!r} are others when {completion[:20]!r} follows; "
            "begin the completion with a space or a new line"
        )
    return score_tokens(model, given, [whole[len(given) :]])
