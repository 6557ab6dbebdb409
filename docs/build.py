"""Pages of the site from the papers, their results and the docstrings: `make docs` runs this, then mkdocs.

python docs/build.py            writes Markdown to out/docs
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

from latex2mathml.converter import convert

from paperworks.lab.paper import Paper
from paperworks.lab.results import Outcome, Result, find_result, reading_folders
from paperworks.lab.values import ordinal, shown
from paperworks.papers import Entry, index, load

HERE = Path(__file__).parent
ROOMS = (
    "api", "adapt", "checkpoints", "compress", "core", "data", "evaluate", "generation", "interpret", "interpret.sae",
    "lab", "models", "nn", "train",
)  # fmt: skip
GUIDES = ("fine-tune", "quantize", "look-inside", "autoencoder", "steer", "add-a-paper")


def build(out: Path) -> list[Path]:
    """Write all pages and the figures they show into a new folder; returns the pages."""
    shutil.rmtree(out, ignore_errors=True)  # out/ is this repository's own place for what is made
    (out / "papers").mkdir(parents=True)
    for name in ("paperworks.css", "filter.js", "glossary.md"):
        shutil.copy(HERE / name, out / name)
    entries = index()
    results = {entry.key: find_result(reading_folders(), entry.key) for entry in entries}
    pages = {"index.md": home(entries, results)}
    for entry in entries:
        result = results[entry.key]
        pages[f"papers/{entry.key}.md"] = paper_page(load(entry.key), entry, result)
        if result is not None:
            _copy_figures(result, out / "papers")
    for name in GUIDES:
        text = (HERE / "guides" / f"{name}.md").read_text(encoding="utf-8")
        pages[f"guides/{name}.md"] = f"{text}\n\n[As a notebook]({name}.ipynb)\n"
        (out / "guides").mkdir(exist_ok=True)
        (out / "guides" / f"{name}.ipynb").write_text(json.dumps(notebook(text), indent=1), encoding="utf-8")
    for room in ROOMS:
        pages[f"reference/{room}.md"] = f"::: paperworks.{room}\n"
    for name, text in pages.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in pages]


def home(entries: list[Entry], results: dict[str, Result | None]) -> str:
    """The list of all papers, grouped, with a field that filters it."""
    lines = [
        "# The reading list, running",
        "",
        f"{len(entries)} papers, each written once as a part that works with all others, each claim checked by an "
        "experiment that anyone can run. The verdict beside a claim says what came out here, and how far the evidence "
        "reaches.",
        "",
        '<input id="paper-filter" type="search" placeholder="Filter: words of a title, an author, a year, a verdict">',
        "",
        "| Paper | Year | Family | Claims |",
        "|---|---|---|---|",
    ]
    for family, group in groupby(entries, key=lambda entry: entry.family):
        for entry in group:
            title = f"[{entry.title.replace('|', chr(92) + '|')}](papers/{entry.key}.md)"
            claims = tally(entry, results[entry.key])
            lines.append(f"| {title}<br>{entry.authors} | {entry.year} | {family} | {claims} |")
    return "\n".join(lines) + "\n"


def tally(entry: Entry, result: Result | None) -> str:
    """Number of claims reproduced, and what else there is."""
    if result is None:
        return verdict("never run")
    counts = [outcome.verdict for outcome in result.claims]
    rest = {kind: counts.count(kind) for kind in dict.fromkeys(counts) if kind != "holds"}
    words = "".join(f" {verdict(kind, f'{count} {kind}')}" for kind, count in rest.items())
    return f"{counts.count('holds')} of {len(entry.claims)} reproduced{words}"


def paper_page(paper: Paper, entry: Entry, result: Result | None) -> str:
    """One paper: what it says, what was built, how to use it, how each claim came out."""
    number = entry.ref.removeprefix("arXiv:")
    link = f"[{entry.ref}](https://arxiv.org/abs/{number})" if entry.ref.startswith("arXiv:") else entry.ref
    lines = [f"# {paper.title}", "", f"{paper.authors}, {paper.year}. {link}", "", paper.summary, ""]
    if paper.equation:
        lines += [convert(paper.equation, display="block"), ""]
    parts = ", ".join(f"`{name.removeprefix('paperworks.')}`" for name in paper.implements)
    lines += [f"**Built here:** {parts}. `paperworks run {paper.key}` checks the claims below.", ""]
    if paper.usage:
        lines += ["## Use it", "", "```python", paper.usage.strip(), "```", ""]
    if paper.notes:
        lines += [paper.notes, ""]
    lines += ["## Claims", ""]
    outcomes = {} if result is None else {outcome.name: outcome for outcome in result.claims}
    for claim in paper.claims:
        outcome = outcomes.get(claim.name)
        status = "never run" if outcome is None else outcome.verdict
        lines += [f"### {claim.statement}", "", f'{verdict(status)} <span class="reach">{claim.reach}</span>', ""]
        lines += [f"**The paper:** {claim.paper}", ""]
        if claim.control:
            lines += [f"**Control:** {claim.control}", ""]
        if outcome is not None:
            lines += [*outcome_lines(outcome), ""]
    lines += list(_history(result))
    return "\n".join(lines) + "\n"


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """What was measured, over which seeds, with figures."""
    for check, passed in outcome.checks.items():
        yield f"- {'yes' if passed else '**no**'}: {escape(check)}"
    yield ""
    if outcome.arms:
        seeds = outcome.seeds or []
        yield "| arm | quantity | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
        yield "|---|---|" + "---|" * len(seeds)
        for arm, metrics in outcome.arms.items():
            for name, values in metrics.items():
                yield f"| {arm} | {name} | " + " | ".join(shown(value) for value in values) + " |"
    else:
        yield "| measured | here |"
        yield "|---|---|"
        for name, value in (*outcome.measured.items(), *(outcome.control or {}).items()):
            yield f"| {escape(name)} | {escape(shown(value))} |"
    yield ""
    if outcome.interval is not None:
        low, high = outcome.interval["low"], outcome.interval["high"]
        yield f"{outcome.difference}: 95% interval {shown(low)} to {shown(high)} (bootstrap over seeds, paired)."
        yield ""
    for name in outcome.figures:
        yield f"![{outcome.statement}]({name})"
        yield ""
    if outcome.note:
        yield outcome.note
        yield ""
    yield f"*{outcome.seconds:.0f} s, {len(outcome.seeds or [0])} seeds.*"


def _history(result: Result | None) -> Iterator[str]:
    if result is None or not result.earlier:
        return
    yield "## Earlier designs"
    yield ""
    yield f"What stands above is the {ordinal(len(result.earlier) + 1)} design. Before:"
    yield ""
    for design in result.earlier:
        verdicts = ", ".join(f"{name}: {status}" for name, status in design.verdicts.items())
        seeds = ", ".join(map(str, design.seeds))
        yield f"- {design.date or 'no date'}, seeds {seeds}, `{design.hash[:12]}`: {verdicts}"


def verdict(status: str, words: str | None = None) -> str:
    """A verdict as a coloured word."""
    return f'<span class="verdict {status.replace(" ", "-")}">{words or status}</span>'


def notebook(markdown: str) -> dict[str, object]:
    """A guide as a notebook: its blocks of Python become cells."""
    cells: list[dict[str, object]] = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```", markdown, flags=re.DOTALL)):
        source = part.strip("\n").splitlines(keepends=True)
        if not source:
            continue
        if number % 2:
            code: dict[str, object] = {"execution_count": None, "outputs": []}
            cells.append({"cell_type": "code", "metadata": {}, "source": source} | code)
        else:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _copy_figures(result: Result, folder: Path) -> None:
    for source in reading_folders():
        for outcome in result.claims:
            for name in outcome.figures:
                if (source / name).is_file():
                    shutil.copy(source / name, folder / name)


if __name__ == "__main__":
    written = build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "out" / "docs")
    print(f"{len(written)} pages")
