"""`paperworks list`: the reading list and how its claims came out. Imports neither torch nor any paper."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby

from paperworks.cli.recorded import COLORS, STATUSES, Recorded, reach, recorded
from paperworks.core.errors import unknown
from paperworks.lab import source_cache
from paperworks.lab.results import reading_folders
from paperworks.papers import Entry, index

Row = tuple[Entry, Recorded]

SHORTEST_TITLE = 12  # columns; where less is left, the title is left out


def main(arguments: list[str]) -> int:
    """Print the papers, one a line, all or those that are looked for."""
    options = _parser().parse_args(arguments)
    entries = _selected(index(), options)
    folders = reading_folders()
    remembered = source_cache.load()
    rows = [(entry, recorded(entry, folders)) for entry in entries]
    source_cache.save(remembered)
    if options.stale:
        rows = [row for row in rows if row[1].stale]
    if options.status is not None:
        if options.status not in STATUSES:
            raise ValueError(unknown("status", options.status, STATUSES))
        rows = [row for row in rows if options.status in row[1].statuses]
    if options.json:
        print(json.dumps([_plain(entry, record) for entry, record in rows], indent=1, ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_rows(rows)
    else:
        print("".join("\t".join(_cells(entry, record)) + "\n" for entry, record in rows), end="")
    for _, record in rows:
        if record.damaged:
            print(record.damaged, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paperworks list", description="Show the reading list.")
    parser.add_argument("--search", metavar="WORD", help="only papers with this in title, authors, summary, key or ref")
    parser.add_argument("--family", help="only papers of this family")
    parser.add_argument("--year", help="only papers of this year, or of years such as 2019-2021")
    parser.add_argument("--stale", action="store_true", help="only papers whose code has changed since they were run")
    parser.add_argument("--status", help=f"only papers with a claim that is: {', '.join(STATUSES)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _selected(entries: list[Entry], options: argparse.Namespace) -> list[Entry]:
    families = {entry.family for entry in entries}
    if options.family is not None and options.family not in families:
        raise ValueError(unknown("family", options.family, families))
    tests: list[Callable[[Entry], bool]] = []
    if options.family is not None:
        tests.append(lambda entry: entry.family == options.family)
    if options.year is not None:
        first, last = _years(options.year)
        tests.append(lambda entry: first <= entry.year <= last)
    if options.search is not None:
        word = options.search.casefold()
        tests.append(lambda entry: word in _searched(entry))
    return [entry for entry in entries if all(test(entry) for test in tests)]


def _searched(entry: Entry) -> str:
    return "\n".join((entry.title, entry.authors, entry.summary, entry.key, entry.ref)).casefold()


def _years(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{4})(?:-(\d{4}))?", text)
    if match is None:
        raise ValueError(f"--year {text!r} is neither a year nor two such as 2019-2021")
    return int(match[1]), int(match[2] or match[1])


def _plain(entry: Entry, record: Recorded) -> dict[str, object]:
    values = dataclasses.asdict(entry)
    del values["file"]
    return {
        **values,
        "tour": entry.tour,
        "url": entry.url,
        "reach": reach(entry),
        "reproduced": record.holding,
        "verdicts": record.verdicts,
        "stale": record.stale,
        "damaged": bool(record.damaged),
        "scale": record.result.scale if record.result else None,
    }


def _cells(entry: Entry, record: Recorded) -> list[str]:
    marks = ", ".join(record.marks())
    return [entry.family, entry.key, str(entry.year), entry.title, record.reproduced(), reach(entry), marks]


def _print_rows(rows: list[Row]) -> None:
    """One line a paper, no wider than the terminal, under the name of its family."""
    from rich.console import Console

    console = Console(highlight=False)
    cells = [_cells(entry, record) for entry, record in rows]
    key, count = (max((len(cell[column]) for cell in cells), default=0) for column in (1, 4))
    evidence = max((len(_short(cell[5])) for cell in cells), default=0)
    for family, members in groupby(rows, key=lambda row: row[0].family):
        console.print(f"[bold]{family}[/]")
        for entry, record in members:
            console.print(_line(entry, record, (key, count, evidence), console.width), soft_wrap=True)
    console.print(_tally(rows), soft_wrap=True)


def _line(entry: Entry, record: Recorded, widths: tuple[int, int, int], width: int) -> str:
    """Key, year, count, reach, marks, and as much of the title as there is room for."""
    from rich.markup import escape

    key, count, evidence = widths
    link = f"[link={entry.url}]{entry.key}[/link]" if entry.url else entry.key
    parts = [
        f"  {link}{' ' * (key - len(entry.key))}",
        f"[dim]{entry.year}[/]",
        f"[{record.color()}]{record.reproduced():<{count}}[/]",
        f"{_short(reach(entry)):<{evidence}}",
    ]
    marks = ", ".join(record.marks())
    if marks:
        parts.append(f"[{'magenta' if record.stale else COLORS['one seed']}]{marks}[/]")
    used = 2 + key + 2 + 4 + 2 + count + 2 + evidence + (2 + len(marks) if marks else 0)
    room = width - used - 2
    if room >= SHORTEST_TITLE:
        title = entry.title if len(entry.title) <= room else entry.title[: room - 1].rstrip() + "…"
        parts.append(f"[dim]{escape(title)}[/]")
    return "  ".join(parts)


def _short(evidence: str) -> str:
    """Reach in a column of a terminal; `show` says which claim reaches how far."""
    return "mixed" if "+" in evidence else evidence


def _tally(rows: list[Row]) -> str:
    if not rows:
        return "no paper matches"
    counts = Counter(verdict for _, record in rows for verdict in record.verdicts.values())
    claims = ", ".join(
        f"{counts[status]} {'reproduced' if status == 'holds' else status}" for status in STATUSES if counts[status]
    )
    stale = sum(record.stale for _, record in rows)
    return f"\n{len(rows)} papers, {stale} stale; {sum(counts.values())} claims: {claims}"
