"""`paperworks show KEY`: what a paper is about, its parts, its claims and how they came out. Imports no torch."""

from __future__ import annotations

import argparse
from collections import Counter
from textwrap import indent
from typing import TYPE_CHECKING

from paperworks.cli.recorded import COLORS, NEVER, Recorded, label, recorded
from paperworks.lab.results import Design, Outcome, reading_folders
from paperworks.lab.values import ordinal, shown
from paperworks.papers import Entry, Statement, lookup

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: list[str]) -> int:
    """Print a paper, or the papers that share an arXiv number."""
    parser = argparse.ArgumentParser(prog="paperworks show", description="Show one paper of the reading list.")
    parser.add_argument("key", help="the paper's key, as in `paperworks list`, or its arXiv number")
    key = parser.parse_args(arguments).key
    entries = lookup(key)

    from rich.console import Console

    console = Console(highlight=False)
    for number, entry in enumerate(entries):
        if number:
            console.rule()
        _print_paper(console, entry, recorded(entry, reading_folders()))
    return 0


def _print_paper(console: Console, entry: Entry, record: Recorded) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    reference = escape(entry.ref)
    if entry.url:
        reference = f"[link={entry.url}]{reference}[/link]"
    console.print(f"[bold]{escape(entry.title)}[/]")
    console.print(f"[dim]{escape(entry.authors)} {entry.year} · {reference} · {escape(entry.family)}[/]\n")
    console.print(escape(entry.summary) + "\n")
    console.print("[bold]Parts[/]")
    for part in entry.implements:
        console.print(f"  {escape(part)}")
    for heading, text in (("Equation", entry.equation), ("Usage", entry.usage)):
        if text:
            console.print(f"\n[bold]{heading}[/]")
            console.print(escape(indent(text.strip(), "  ")), soft_wrap=True)  # to be copied
    if entry.notes:
        console.print("\n[bold]Notes[/]")
        console.print(Padding(escape(entry.notes), (0, 0, 0, 2)))
    marks = "".join(f", {mark}" for mark in record.marks())
    console.print(f"\n[bold]Claims[/]  [{record.color()}]{record.reproduced()}[/]{marks}")
    outcomes = {outcome.name: outcome for outcome in record.result.claims} if record.result else {}
    for claim in entry.claims:
        console.print()
        for line in _claim_lines(claim, outcomes.get(claim.name)):
            console.print(Padding(line, (0, 0, 0, 2)))
    if record.damaged:
        console.print(f"\n[red]{escape(record.damaged)}[/]", soft_wrap=True)
    if record.result:
        _print_history(console, entry, record)


def _print_history(console: Console, entry: Entry, record: Recorded) -> None:
    from rich.markup import escape

    result = record.result
    assert result is not None
    environment = result.environment
    where = f"{environment.get('processor', '')}, {environment.get('date', '')}"
    console.print(f"\n[dim]last run at the {result.scale} scale on {escape(where)}[/]")
    console.print(f"[dim]{ordinal(result.design_number)} design[/]")
    for number, design in enumerate(result.earlier, 1):
        console.print(f"[dim]  {ordinal(number)}: {escape(describe_design(design))}[/]")
    if record.stale:
        console.print(f"[magenta]The code has changed since: `paperworks run {entry.key}` measures it again.[/]")


def describe_design(design: Design) -> str:
    """An earlier design in one line: its seeds, how many claims had which verdict, and when."""
    counts = Counter(design.verdicts.values())
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    seeds = ", ".join(map(str, design.seeds))
    date = f", {design.date.partition(' ')[0]}" if design.date else ""
    return f"{verdicts} (seed{'s' if len(design.seeds) > 1 else ''} {seeds}{date}, {design.hash[:8]})"


def _claim_lines(claim: Statement, outcome: Outcome | None) -> list[str]:
    from rich.markup import escape

    verdict = outcome.verdict if outcome else NEVER
    lines = [f"[{COLORS[verdict]}]{label(verdict)}[/] [dim]({claim.reach})[/]  [bold]{escape(claim.statement)}[/]"]
    lines.append(f"[dim]the paper:[/] {escape(claim.paper)}")
    if claim.control:
        lines.append(f"[dim]control:[/] {escape(claim.control)}")
    if outcome is None:
        return lines
    for name, value in outcome.measured.items():
        lines.append(f"[dim]measured:[/] {escape(name)} [bold]{escape(shown(value))}[/]")
    for name, value in (outcome.control or {}).items():
        lines.append(f"[dim]control:[/] {escape(name)} [bold]{escape(shown(value))}[/]")
    if outcome.arms:
        lines.append(f"[dim]seeds:[/] {', '.join(map(str, outcome.seeds))}")
    if outcome.interval:
        low, high = shown(outcome.interval["low"]), shown(outcome.interval["high"])
        lines.append(f"[dim]95% interval:[/] {escape(outcome.difference)} from [bold]{low}[/] to [bold]{high}[/]")
    lines += [f"[red]failed:[/] {escape(name)}" for name, passed in outcome.checks.items() if not passed]
    if outcome.arms:
        lines += [f"[green]passed:[/] {escape(name)}" for name, passed in outcome.checks.items() if passed]
    if outcome.note:
        lines.append(f"[dim]{escape(outcome.note)}[/]")
    return lines
