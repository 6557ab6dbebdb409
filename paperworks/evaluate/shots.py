"""Examples before a question: few-shot prompts as of GPT-3 (Brown et al. 2020, arXiv:2005.14165)."""

from __future__ import annotations

import random
from collections.abc import Sequence

Example = tuple[str, str]


def few_shot(
    examples: Sequence[Example],
    question: str,
    *,
    shots: int,
    seed: int = 0,
    instruction: str = "",
    separator: str = "\n\n",
) -> str:
    """`shots` solved examples, drawn at random, and the question, to be continued.

    Args:
        examples: (question, answer) of a training split, the answer beginning as it should after the question
            (" Paris"); one whose question is the one asked is never shown.
        question: what is asked; the prompt ends with it.
        shots: examples shown; 0 shows none.
        seed: which are drawn; the question takes part, so that each has its own.
        instruction: a line before everything; separator: what stands between examples.

    Raises ValueError when there are not so many other examples.
    """
    others = [example for example in examples if example[0] != question]
    if not 0 <= shots <= len(others):
        raise ValueError(
            f"shots must be between 0 and the {len(others)} examples that are not the question, got {shots}"
        )
    drawn = random.Random(f"{seed} {question}").sample(others, shots)
    parts = [instruction] if instruction else []
    return separator.join([*parts, *(asked + answer for asked, answer in drawn), question])
