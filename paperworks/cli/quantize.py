"""`paperworks quantize MODEL --format gptq --out DIR`: compress a model and save it, resumable."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from paperworks.cli.loading import load_model
from paperworks.cli.options import parse

if TYPE_CHECKING:
    from torch import Tensor

    from paperworks.compress import WeightFormat


@dataclass(frozen=True, kw_only=True)
class Options:
    """Store a model's linear layers in a weight format, and save the result.

    The folder loads with paperworks.load, decodes, and can be fine-tuned with any adapter. When interrupted, the same
    command goes on at the block where it stopped.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An asset's name, a directory, a .gguf file or "org/name" on the hub."""
    format: str
    """rtn, int8, llm-int8, fp8, smoothquant, nf4, fp4, gptq, awq, quip, quip-sharp, aqlm, magnitude, wanda, sparsegpt,
    or a GGUF type such as q4_k."""
    out: Path
    """The folder to write."""
    bits: int | None = None
    """Bits a weight, where the format leaves a choice."""
    group: int | None = None
    """Weights that share a scale, where the format leaves a choice; 0 for whole rows. Left out, it is at most 128 and
    divides every row."""
    sparsity: float | None = None
    """Share of weights removed, for the pruning formats."""
    pattern: str | None = None
    """Such as 2:4, for the pruning formats."""
    targets: str = "all-linear"
    """Which layers: "all-linear", "attention", "feedforward", or a pattern over module paths."""
    calibration: Path | None = None
    """A text for formats that learn from data (gptq, awq ...); for others it measures each layer's output error."""
    sequences: int = 16
    """Calibration sequences."""
    length: int = 512
    """Tokens of each calibration sequence."""
    text: Path | None = None
    """A text file to measure perplexity on, before and after."""


def main(arguments: list[str]) -> int:
    """Compress, report and save."""
    options = parse(Options, "quantize", arguments)  # before torch is loaded: --help is quick

    import paperworks as pw
    from paperworks import compress
    from paperworks.compress.named import named

    format = named(
        options.format,
        bits=options.bits,
        group=options.group or None,
        sparsity=options.sparsity,
        pattern=options.pattern,
    )
    if format.needs and options.calibration is None:
        raise ValueError(
            f"{options.format} learns from data: give --calibration FILE, a text like those the model will see"
        )
    if options.out.exists():
        raise ValueError(f"{options.out} exists; give another --out, or remove it first")
    texts = {path: _read(path) for path in (options.calibration, options.text) if path is not None}
    model = load_model(options.model)
    format = _grouped(format, model, options)
    batches = None
    if options.calibration is not None:
        batches = _batches(model, texts[options.calibration], options)
    score = None if options.text is None else _scorer(model, texts[options.text])
    before = None if score is None else score(model)
    with _Bar() as bar:
        compress.apply(
            model,
            format,
            options.targets,
            calibration=batches,
            resume=options.out.with_name(options.out.name + ".unfinished"),
            progress=bar.show,
        )
    report = compress.report(model, score=score)
    pw.save(model, options.out)
    print(report)
    if before is not None:
        print(f"perplexity on {options.text}: {before:.3f} before, {report.after:.3f} after")
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    print(f"saved to {options.out} ({size:,} bytes of weights); load it with paperworks.load({str(options.out)!r})")
    return 0


def _grouped(format: WeightFormat, model: Any, options: Options) -> WeightFormat:
    """Give grids along rows the group that was asked for, or the largest usual one that divides every row."""
    from paperworks.compress.formats.uniform import Uniform
    from paperworks.core.linear import features
    from paperworks.core.selection import select_linears

    if options.group == 0:
        if not isinstance(format, Uniform):
            raise ValueError(
                f"--group 0 asks for one scale a row, which {options.format} does not have: leave --group out"
            )
        return replace(format, group=None)
    if options.group or not isinstance(format, Uniform) or format.group is None:
        return format
    usual = format.group
    widths = {features(module)[0] for module in select_linears(model, options.targets).values()}
    group = next(size for size in (usual, 64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))
    if group != usual:
        print(f"groups of {group}: {usual} does not divide every row; --group chooses", file=sys.stderr)
    return replace(format, group=group)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text")
    return text


def _batches(model: Any, text: str, options: Options) -> list[Tensor]:
    """Cut the calibration text into sequences that lie evenly over it."""
    import torch

    tokens = _tokens(model, text, limit=None)
    if options.sequences < 1 or options.length < 2:
        raise ValueError(f"--sequences {options.sequences} --length {options.length}: at least 1 and 2 are needed")
    if len(tokens) < options.length:
        raise ValueError(
            f"{options.calibration} gives {len(tokens)} tokens, fewer than one sequence of {options.length}; give a "
            "longer text or a smaller --length"
        )
    count = min(options.sequences, len(tokens) // options.length)
    if count < options.sequences:
        print(f"{options.calibration} is enough for {count} sequences of {options.length}", file=sys.stderr)
    starts = torch.linspace(0, len(tokens) - options.length, count).long().tolist()
    return [tokens[start : start + options.length][None] for start in starts]


def _scorer(model: Any, text: str) -> Any:
    from paperworks import train

    tokens = _tokens(model, text, limit=16_384)
    context = min(512, len(tokens))
    return lambda scored: train.perplexity(scored, tokens, context)


def _tokens(model: Any, text: str, limit: int | None) -> Tensor:
    import torch

    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read text files")
    ids = model.tokenizer.encode(text if limit is None else text[: 8 * limit])
    return torch.tensor(ids if limit is None else ids[:limit])


class _Bar:
    """One line of progress with the remaining time, where there is somebody to see it."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("compressing", total=None)
        return self

    def show(self, path: str, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, description=path, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
