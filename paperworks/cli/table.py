"""The table that a run ends with: claim, what the paper says, what was measured, verdict, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paperworks.cli.recorded import COLORS, label
from paperworks.lab.results import Outcome
from paperworks.lab.values import Value, shown


def print_outcomes(outcomes: Sequence[tuple[str, Outcome]]) -> None:
    """Print (paper's key, outcome) pairs, then once each sentence on what was not run or failed."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    table = Table(box=box.ROUNDED, border_style="dim", show_lines=True)
    table.add_column("Claim", ratio=3)
    table.add_column("The paper says", ratio=3)
    table.add_column("Measured", ratio=4)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Seconds", justify="right")
    for key, outcome in outcomes:
        table.add_row(
            f"[bold]{escape(outcome.statement)}[/]\n[dim]{escape(key)}[/]",
            escape(outcome.paper),
            escape(_brief(outcome.measured)),
            f"[{COLORS[outcome.verdict]}]{label(outcome.verdict)}[/]\n[dim]{outcome.reach}{_seeds(outcome)}[/]",
            f"{outcome.seconds:.1f}",
        )
    console.print(table)
    for key, outcome in outcomes:
        if outcome.verdict in ("partly", "not reproduced"):
            failed = [name for name, passed in outcome.checks.items() if not passed]
            lines = "".join(f"\n  {escape(name)}" for name in failed)
            console.print(f"[yellow]Failed in {escape(key)}: {escape(outcome.name)}[/]{lines}", soft_wrap=True)
    for note in dict.fromkeys(outcome.note for _, outcome in outcomes if outcome.verdict == "not run"):
        console.print(f"[bold]Not run:[/] {escape(note)}", soft_wrap=True)
    for key, outcome in outcomes:
        if outcome.verdict == "error":
            console.print(f"[red]Error in {escape(key)}: {escape(outcome.name)}[/]\n{escape(outcome.note)}")


def _seeds(outcome: Outcome) -> str:
    return f", {len(outcome.seeds)} seeds" if len(outcome.seeds) > 1 else ""


def _brief(values: Mapping[str, Value], most: int = 4) -> str:
    lines = [f"{name} {shown(value)}" for name, value in list(values.items())[:most]]
    return "\n".join(lines) or "-"
