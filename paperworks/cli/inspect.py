"""`paperworks inspect MODEL [TEXT]`: what a model is made of, or a page of what it makes of a text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from paperworks.cli.loading import load_model
from paperworks.cli.options import parse

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a model is made of; with a text, write a page of what it makes of it."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An asset's name, a directory, a .gguf file or "org/name" on the hub."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]")] = ""
    """A prompt to look at: logit lens, attention, logit attribution, neurons."""
    out: str = "out/inspect.html"
    """Where to write the page."""


def main(arguments: list[str]) -> int:
    """Print what a model is made of, or write the page of a prompt."""
    import paperworks as pw

    options = parse(Options, "inspect", arguments)
    model = load_model(options.model)
    if options.text:
        print(f"written to {_write_page(options.model, model, options.text, Path(options.out))}")
    else:
        _print_model(options.model, model, pw.count_parameters(model.spec))
    return 0


def _write_page(name: str, model: Any, text: str, out: Path) -> Path:
    import torch

    from paperworks.cli.prompt_page import MOST_TOKENS, page
    from paperworks.core import atomic
    from paperworks.interpret.lenses.prompt_view import prompt_view

    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so a text cannot be read; use interpret.prompt_view with tokens")
    tokens = model.tokenizer.encode(text)
    if not 0 < len(tokens) <= MOST_TOKENS:
        raise ValueError(
            f"the text has {len(tokens)} tokens; a page holds 1 to {MOST_TOKENS} (attention grows with the square)"
        )
    view = prompt_view(model, torch.tensor(tokens))
    out.parent.mkdir(parents=True, exist_ok=True)
    about = f"{len(tokens)} tokens through {len(view.lens_tokens) - 1} blocks."
    with atomic.writing_file(out) as path:
        path.write_text(
            page(view, lambda token: model.tokenizer.decode([token]), f"{name}: one prompt", about), encoding="utf-8"
        )
    return out


def _print_model(name: str, model: Any, total: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(name)}[/]  {total:,} parameters, {_megabytes(model):,.0f} MB in memory\n")
    console.print(spec_tree(model.spec))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Part", style="bold")
    table.add_column("Parameters", justify="right")
    table.add_column("Share", justify="right")
    for part, count in parts(model).items():
        table.add_row(part, f"{count:,}", f"{count / max(total, 1):.1%}")
    console.print(table)
    console.print(f"Tokenizer: {escape(_describe_tokenizer(model.tokenizer))}")
    context = getattr(model.spec, "context", None)
    console.print(f"Context: {f'{context:,} tokens' if context else 'no fixed length'}")


def spec_tree(spec: Any) -> Tree:
    """A spec as a rich tree; equal blocks that follow each other are shown once with their number."""
    from rich.markup import escape
    from rich.tree import Tree

    def grow(tree: Tree, value: Any) -> None:
        for field in dataclasses.fields(value):
            entry = getattr(value, field.name)
            label = f"[cyan]{field.name}[/]"
            if dataclasses.is_dataclass(entry):
                grow(tree.add(f"{label} [bold]{type(entry).__name__}[/]"), entry)
            elif isinstance(entry, tuple) and entry and all(map(dataclasses.is_dataclass, entry)):
                branch = tree.add(f"{label} [dim]({len(entry)})[/]")
                for first, last, element in _runs(entry):
                    numbers = f"{first}" if first == last else f"{first} to {last}"
                    grow(branch.add(f"[cyan]{numbers}[/] [bold]{type(element).__name__}[/]"), element)
            else:
                tree.add(f"{label} {escape(repr(entry))}")

    root = Tree(f"[bold]{type(spec).__name__}[/]", guide_style="dim")
    grow(root, spec)
    return root


def _runs(entries: tuple[Any, ...]) -> list[tuple[int, int, Any]]:
    """Group equal neighbours: (first index, last index, entry)."""
    runs: list[tuple[int, int, Any]] = []
    for index, entry in enumerate(entries):
        if runs and runs[-1][2] == entry:
            runs[-1] = (runs[-1][0], index, entry)
        else:
            runs.append((index, index, entry))
    return runs


def parts(model: Any) -> dict[str, int]:
    """Count the parameters of each part at the top of a model; a tied one counts for the part that comes first."""
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _megabytes(model: Any) -> float:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def _describe_tokenizer(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    size = getattr(tokenizer, "vocab_size", None)
    return type(tokenizer).__name__ + (f", {size:,} tokens" if isinstance(size, int) else "")
