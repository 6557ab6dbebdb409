"""The reading list: one module a paper, found by reading the files, imported only when a paper is run.

papers/<family>/<module>.py      paper = Paper(key=..., title=..., ...)     with literal values only
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.core.errors import unknown

if TYPE_CHECKING:
    from paperworks.lab import Paper

__all__ = ["Entry", "find", "index", "load"]

_PAPER = re.compile(r"^paper = Paper\((?:[^\n]*\)$|.*?^\)$)", re.MULTILINE | re.DOTALL)
_CLAIM = re.compile(r"^@paper\.claim\((.*?)^def ", re.MULTILINE | re.DOTALL)
_TOUR = re.compile(r"^ +tour=(\d+),?$|, tour=(\d+)\)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the file of a paper says about it, without running the file."""

    key: str
    title: str
    authors: str
    year: int
    ref: str
    family: str
    summary: str
    implements: tuple[str, ...]
    module: str  # dotted name of the file
    claims: int
    tour: tuple[int, ...]  # positions in the tour of those claims that are in it
    source_hash: str  # sha256 of the file's text, as recorded in a result


def index(folder: Path | None = None) -> list[Entry]:
    """Read all papers, by family and year.

    Raises ValueError for a file without a readable `paper = Paper(...)`, or two papers with one key.
    """
    root = folder or Path(__file__).parent
    files = sorted(
        [path for path in root.glob("*/*.py") if not path.name.startswith("_")] + [*root.glob("*/*/paper.py")]
    )
    entries = sorted((_read(path) for path in files), key=lambda entry: (entry.family, entry.year, entry.key))
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in seen:
            raise ValueError(f"{entry.module} and {seen[entry.key].module} both have the key {entry.key!r}; change one")
        seen[entry.key] = entry
    return entries


def find(key: str) -> Entry:
    """Return the entry of a paper; raises ValueError that names the nearest keys."""
    entries = {entry.key: entry for entry in index()}
    if key not in entries:
        raise ValueError(unknown("paper", key, entries))
    return entries[key]


def load(key: str) -> Paper:
    """Import the module of one paper and return its `paper`; raises ValueError that names the nearest keys."""
    module = importlib.import_module(find(key).module)
    paper: Paper = module.paper
    return paper


def _read(path: Path) -> Entry:
    content = path.read_bytes()
    text = content.decode("utf-8")
    module = ".".join((__name__, *path.relative_to(Path(__file__).parent).with_suffix("").parts))
    values = _literal_values(text, module)
    decorators = _CLAIM.findall(text)
    positions = [int(first or second) for body in decorators for first, second in _TOUR.findall(body)]
    try:
        return Entry(
            **values,
            module=module,
            claims=len(decorators),
            tour=tuple(positions),
            source_hash=hashlib.sha256(content).hexdigest(),
        )
    except TypeError as error:
        raise ValueError(f"{module}: `paper = Paper(...)` does not have the fields of a paper: {error}") from error


def _literal_values(text: str, module: str) -> dict[str, Any]:
    """Evaluate the literal keyword arguments of `paper = Paper(...)`; only that statement is parsed, for speed."""
    match = _PAPER.search(text)
    if match is None:
        raise ValueError(f"{module} has no statement `paper = Paper(...)` at its top level")
    statement = ast.parse(match.group()).body[0]
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"{module}: write `paper = Paper(key=..., title=..., ...)` with keyword arguments")
    try:
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError as error:
        raise ValueError(f"{module}: the values in `paper = Paper(...)` must be literals ({error})") from error
