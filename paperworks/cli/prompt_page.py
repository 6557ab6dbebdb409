"""The page of one prompt: what `interpret.prompt_view` found, as a single HTML file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paperworks.cli.pages import render

if TYPE_CHECKING:
    from torch import Tensor

    from paperworks.interpret.lenses.prompt_view import PromptView

MOST_TOKENS = 160  # attention alone takes heads x blocks x tokens^2 bytes: 7 MB here for SmolLM2


def page(view: PromptView, text_of: Callable[[int], str], title: str, about: str) -> str:
    """The HTML.

    Args:
        view: what was found.
        text_of: the text of one token.
        title, about: the heading and the line below it.
    """
    names = [text_of(token) for token in view.tokens.tolist()]
    patterns = list(view.patterns.values())
    data = {
        "tokens": names,
        "lens": {
            "tokens": [[[text_of(token) for token in cell] for cell in row] for row in view.lens_tokens.tolist()],
            "probabilities": _rounded(view.lens_probabilities.tolist(), 4),
            "answer": _rounded(view.answer_probabilities.tolist(), 4),
            "ranks": view.answer_ranks.tolist(),
        },
        "patterns": {
            path: base64.b64encode(pattern.numpy().tobytes()).decode("ascii") for path, pattern in view.patterns.items()
        },
        "start": _telling_head(patterns),
        "components": list(view.components),
        "effects": _rounded(view.effects.tolist(), 3),
        "neurons": [
            [[x.path, x.unit, round(x.activation, 3), round(x.effect, 3)] for x in some] for some in view.neurons
        ],
    }
    return render("prompt_page.html", title, about, data)


def _rounded(values: list[object], digits: int) -> list[object]:
    return [
        _rounded(value, digits) if isinstance(value, list) else round(float(value), digits)  # type: ignore[arg-type]
        for value in values
    ]


def _telling_head(patterns: Sequence[Tensor]) -> list[int]:
    """(block, head) to show first: the one that looks least at the first token and at itself."""
    best, place = -1.0, [0, 0]
    for block, pattern in enumerate(patterns):
        weights = pattern.float()
        elsewhere = weights.tril(-1)[:, :, 1:].sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)
        value, head = elsewhere.max(0)
        if float(value) > best:
            best, place = float(value), [block, int(head)]
    return place
