"""`paperworks list`: the reading list and how its claims came out. Imports neither torch nor any paper."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter

from paperworks.cli.recorded import STATUSES, Recorded, recorded
from paperworks.core.errors import unknown
from paperworks.lab.results import results_folder
from paperworks.papers import Entry, index


def main(arguments: list[str]) -> int:
    """Print the papers, all or those of a family or status."""
    parser = argparse.ArgumentParser(prog="paperworks list", description="Show the reading list.")
    parser.add_argument("--family", help="only papers of this family")
    parser.add_argument("--status", help=f"only papers with this status: {', '.join(STATUSES)}, or stale")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    folder = results_folder()
    rows = [(entry, recorded(entry, folder)) for entry in _of_family(index(), options.family)]
    rows = _of_status(rows, options.status)
    if options.json:
        print(json.dumps([_plain(entry, record) for entry, record in rows], indent=1, ensure_ascii=False))
    else:
        _print_table(rows)
    return 0


def _of_family(entries: list[Entry], family: str | None) -> list[Entry]:
    families = {entry.family for entry in entries}
    if family is not None and family not in families:
        raise ValueError(unknown("family", family, families))
    return [entry for entry in entries if family in (None, entry.family)]


def _of_status(rows: list[tuple[Entry, Recorded]], status: str | None) -> list[tuple[Entry, Recorded]]:
    if status is None:
        return rows
    if status == "stale":
        return [row for row in rows if row[1].stale]
    if status not in STATUSES:
        raise ValueError(unknown("status", status, (*STATUSES, "stale")))
    return [row for row in rows if row[1].status == status]


def _plain(entry: Entry, record: Recorded) -> dict[str, object]:
    return {
        **dataclasses.asdict(entry),
        "status": record.status,
        "stale": record.stale,
        "holding": record.holding,
        "scale": record.result.scale if record.result else None,
    }


def _print_table(rows: list[tuple[Entry, Recorded]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # wide enough for a line a paper when the output is read by a program
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, style in (
        ("Family", "dim"),
        ("Key", "bold"),
        ("Year", ""),
        ("Title", ""),
        ("Claims", ""),
        ("Status", ""),
    ):
        table.add_column(
            name, style=style, justify="right" if name == "Claims" else "left", no_wrap=name in ("Key", "Status")
        )
    family = None
    for entry, record in rows:
        claims = f"{record.holding}/{entry.claims}" if record.result else str(entry.claims)
        shown = "" if entry.family == family else entry.family
        table.add_row(shown, entry.key, str(entry.year), entry.title, claims, record.markup())
        family = entry.family
    console.print(table)
    counts = Counter(record.status for _, record in rows)
    tally = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    console.print(f"{len(rows)} papers: {tally}" if rows else "no paper matches", highlight=False)
