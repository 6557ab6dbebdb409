"""Pages to look at: a template, its data as JSON and the colours they share, in one file that needs no network."""

from __future__ import annotations

import html
import json
from importlib import resources
from string import Template


def render(template: str, title: str, about: str, data: object) -> str:
    """A page.

    Args:
        template: the file's name, such as "prompt_page.html"; it has places for $style, $title, $about and $data.
        title, about: the heading and the line below it, as plain text.
        data: what the page's script reads, anything JSON holds.
    """
    # "<" could end the script element that holds the data
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_text(template)).substitute(
        style=_text("page_style.css"), title=html.escape(title), about=html.escape(about), data=encoded
    )


def _text(name: str) -> str:
    return resources.files("paperworks.cli").joinpath(name).read_text(encoding="utf-8")
