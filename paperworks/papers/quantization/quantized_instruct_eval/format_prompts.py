"""Instructions whose following can be verified by a rule, in the manner of IFEval (Zhou et al. 2023, 2311.07911)."""

from __future__ import annotations

import re
from collections.abc import Callable

TOPICS = ("the sea", "a cat", "music", "the moon", "bread", "winter", "trains", "gardens", "the colour red", "sleep")

CONSTRAINTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Write one sentence about {}. Use only lower case letters.", lambda text: bool(text) and text == text.lower()),
    ("Write one sentence about {}. Do not use any comma.", lambda text: bool(text) and "," not in text),
    ("Answer in fewer than 15 words: what is good about {}?", lambda text: 0 < len(text.split()) < 15),
    ("Write a list of three things about {}, numbered 1., 2. and 3.", lambda text: _numbered(text)),
    ('Write one sentence about {} and put all of it in double quotes, like "this".', lambda text: _quoted(text)),
)


def prompts(count: int) -> list[tuple[str, Callable[[str], bool]]]:
    """Instructions, each with the rule that says whether an answer follows it; kinds in turn."""
    return [
        (
            CONSTRAINTS[i % len(CONSTRAINTS)][0].format(TOPICS[i // len(CONSTRAINTS) % len(TOPICS)]),
            CONSTRAINTS[i % 5][1],
        )
        for i in range(count)
    ]


def _numbered(text: str) -> bool:
    return all(re.search(rf"(?m)^\s*{number}\.", text) for number in (1, 2, 3))


def _quoted(text: str) -> bool:
    return len(text) > 2 and text.strip()[0] == '"' and text.strip()[-1] == '"'
