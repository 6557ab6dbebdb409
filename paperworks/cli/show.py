"""`paperworks show KEY`: what a paper is about, the parts it contributes, its claims and how they came out."""

from __future__ import annotations

import argparse

from paperworks.cli.recorded import COLORS, Recorded, recorded
from paperworks.lab.paper import Claim, Paper
from paperworks.lab.results import Outcome, results_folder
from paperworks.lab.values import shown
from paperworks.papers import find, load


def main(arguments: list[str]) -> int:
    """Print one paper."""
    parser = argparse.ArgumentParser(prog="paperworks show", description="Show one paper of the reading list.")
    parser.add_argument("key", help="the paper's key, as in `paperworks list`")
    key = parser.parse_args(arguments).key
    entry = find(key)
    _print_paper(load(key), recorded(entry, results_folder()))
    return 0


def _print_paper(paper: Paper, record: Recorded) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    console = Console(highlight=False)
    console.print(f"[bold]{escape(paper.title)}[/]")
    console.print(f"[dim]{escape(paper.authors)} {paper.year} · {escape(paper.ref)} · {escape(paper.family)}[/]\n")
    console.print(escape(paper.summary) + "\n")
    console.print("[bold]Parts[/]")
    for part in paper.implements:
        console.print(f"  {escape(part)}")
    console.print(f"\n[bold]Claims[/]  {record.markup()}")
    outcomes = {outcome.name: outcome for outcome in record.result.claims} if record.result else {}
    for claim in paper.claims:
        console.print()
        for line in _claim_lines(claim, outcomes.get(claim.name)):
            console.print(Padding(line, (0, 0, 0, 2)))
    if record.result:
        environment = record.result.environment
        where = f"{environment.get('processor', '')}, {environment.get('date', '')}"
        console.print(f"\n[dim]last run at the {record.result.scale} scale on {escape(where)}[/]")
    if record.stale:
        console.print(f"[magenta]The module has changed since: `paperworks run {paper.key}` measures it again.[/]")


def _claim_lines(claim: Claim, outcome: Outcome | None) -> list[str]:
    from rich.markup import escape

    verdict = outcome.verdict if outcome else "never run"
    lines = [f"[{COLORS[verdict]}]{verdict}[/]  [bold]{escape(claim.statement)}[/]"]
    lines.append(f"[dim]the paper:[/] {escape(claim.paper)}")
    if claim.control:
        lines.append(f"[dim]control:[/] {escape(claim.control)}")
    if outcome is None:
        return lines
    for name, value in outcome.measured.items():
        lines.append(f"[dim]measured:[/] {escape(name)} [bold]{escape(shown(value))}[/]")
    for name, value in (outcome.control or {}).items():
        lines.append(f"[dim]control:[/] {escape(name)} [bold]{escape(shown(value))}[/]")
    lines += [f"[red]failed:[/] {escape(name)}" for name, passed in outcome.checks.items() if not passed]
    if outcome.note:
        lines.append(f"[dim]{escape(outcome.note)}[/]")
    return lines
