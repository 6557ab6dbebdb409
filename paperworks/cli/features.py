"""`paperworks features MODEL --sae DIR`: a browsable page of what a sparse autoencoder's features respond to and do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from paperworks.cli.loading import load_model
from paperworks.cli.options import parse
from paperworks.cli.pages import render

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paperworks.interpret.sae.evaluation.dashboard import FeatureView

LENGTH, BATCH = 128, 8  # tokens of a sequence, sequences at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a browsable page of the features of a sparse autoencoder."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An asset's name, a directory, a .gguf file or "org/name" on the hub."""
    sae: Path
    """Folder with the autoencoder, as `interpret.sae.save` or SAELens writes it."""
    tap: str | None = None
    """Module whose output it reads, such as blocks.15; where the folder says it, it need not be given."""
    text: Path | None = None
    """A text file to look for passages in; Python's own documentation by default."""
    tokens: int = 32_768
    """Read so many tokens of the text at most."""
    features: tuple[int, ...] = ()
    """Which features; by default the typical ones among those that are on."""
    most: int = 100
    """How many features, where none are named."""
    out: Path = Path("out/features.html")
    """Where to write the page."""


def main(arguments: list[str]) -> int:
    """Write the page."""
    options = parse(Options, "features", arguments)  # before torch is loaded: --help is quick

    from paperworks.core import atomic
    from paperworks.interpret import sae
    from paperworks.interpret.sae.evaluation.dashboard import feature_views

    tap = options.tap or sae.noted_tap(options.sae)
    if tap is None:
        raise ValueError(f"{options.sae} does not say which module it reads; give it, as in --tap blocks.15")
    autoencoder = sae.load(options.sae)
    model = load_model(options.model)
    if model.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so a text cannot be read")
    batches = _batches(model.tokenizer, options)
    count = sum(batch.numel() for batch in batches)
    views = feature_views(model, tap, autoencoder, batches, options.features or None, most=options.most)
    quality = sae.measure(autoencoder, activations(model, tap, batches))
    about = (
        f"{type(autoencoder.spec).__name__}, {autoencoder.latents:,} latents of {tap}; {len(views)} of them over "
        f"{count:,} tokens of {options.text or 'the documentation of Python'}. On these tokens the dictionary explains "
        f"{quality.explained_variance:.0%} of the variance with {quality.l0:.3g} latents a token; "
        f"{quality.dead:.0%} of the latents are never on."
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing_file(options.out) as path:
        names = {"model": options.model, "sae": str(options.sae), "tap": tap}
        text = page(views, lambda token: model.tokenizer.decode([token]), f"Features of {options.model}", about, names)
        path.write_text(text, encoding="utf-8")
    print(f"written to {options.out}")
    return 0


def _batches(tokenizer: Any, options: Options) -> list[Tensor]:
    import torch

    from paperworks.data.text.texts import PYTHON_DOCS, load_text

    text = load_text(PYTHON_DOCS).text if options.text is None else options.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text[: 12 * options.tokens], bos=False)[: options.tokens]
    rows = len(ids) // LENGTH
    if not rows:
        raise ValueError(f"the text has {len(ids)} tokens; at least {LENGTH}, one sequence, are needed")
    return list(torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH).split(BATCH))


def activations(model: nn.Module, tap: str, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the autoencoder reads of some texts, (tokens, dim) a batch; the first token of each text left out."""
    import torch

    from paperworks.interpret import record

    for batch in batches:
        with torch.no_grad(), record(model, tap) as seen:
            model(batch)
        yield next(iter(seen.values()))[:, 1:].flatten(0, 1)


def page(
    views: Sequence[FeatureView], text_of: Callable[[int], str], title: str, about: str, names: Mapping[str, str]
) -> str:
    """The HTML: one file that needs no network.

    Args:
        views: the features.
        text_of: the text of one token.
        title, about: the heading and the line below it.
        names: "model", "sae" and "tap" as given, for the lines that steer.
    """

    def named(pairs: Sequence[tuple[int, float]]) -> list[list[object]]:
        return [[text_of(token), round(value, 4)] for token, value in pairs]

    data = {
        "names": dict(names),
        "features": [
            {
                "index": view.index,
                "density": view.density,
                "largest": view.largest,
                "agreement": view.agreement,
                "strong": view.strong,
                "histogram": view.histogram,
                "excerpts": [
                    {
                        "tokens": [text_of(token) for token in excerpt.tokens],
                        "activations": [round(value, 4) for value in excerpt.activations],
                        "strongest": excerpt.strongest,
                    }
                    for excerpt in view.excerpts
                ],
                "promoted": named(view.promoted),
                "suppressed": named(view.suppressed),
                "neighbours": [[index, round(value, 3)] for index, value in view.neighbours],
            }
            for view in views
        ],
    }
    return render("features_page.html", title, about, data)
