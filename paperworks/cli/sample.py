"""`paperworks sample MODEL "text"`: let a model continue a text, shown as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from paperworks.cli.loading import load_model
from paperworks.cli.options import Sampling, parse


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Let a model continue a text."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An asset's name, a directory, a .gguf file or "org/name" on the hub."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What to continue."""


def main(arguments: list[str]) -> int:
    """Print the text and its continuation."""
    import paperworks as pw

    options = parse(Options, "sample", arguments)
    if not options.text:
        raise ValueError("the text to continue is empty; give at least a word")
    model = load_model(options.model)
    print(options.text, end="", flush=True)
    pw.generate(model, [options.text], stream=lambda piece: print(piece, end="", flush=True), **options.settings())
    print()
    return 0
