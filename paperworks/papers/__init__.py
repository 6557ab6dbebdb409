"""The reading list: one module a paper, found by reading the files, imported only when a paper is run.

papers/<family>/<key>.py            paper = Paper(key=..., title=..., ...)     with literal values only
papers/<family>/<key>/paper.py      the same, with parts of its own beside it in parts.py
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paperworks.core.errors import unknown
from paperworks.lab.fingerprint import fingerprint

if TYPE_CHECKING:
    from paperworks.lab import Paper

__all__ = ["Entry", "Statement", "find", "index", "load", "lookup"]

Kind = Literal["behaviour", "exact", "parity"]

_FOLDER = Path(__file__).parent
_PAPER, _CLAIM = "paper = Paper(", "@paper.claim("
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A claim as it is written in the paper's file; the fields are those of a lab Claim."""

    name: str
    statement: str
    paper: str
    kind: Kind = "behaviour"
    reach: str = "small"
    control: str | None = None
    tour: int | None = None


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
    equation: str = ""
    usage: str = ""
    notes: str = ""
    budget_exception: str = ""
    module: str  # dotted name of the file
    file: Path
    claims: tuple[Statement, ...]

    @property
    def tour(self) -> tuple[int, ...]:
        """Positions in the tour of those claims that are in it."""
        return tuple(claim.tour for claim in self.claims if claim.tour is not None)

    @property
    def fingerprint(self) -> str:
        """Hash of what the paper computes, as recorded in a result."""
        return fingerprint(self.file, self.implements).code

    @property
    def arxiv(self) -> tuple[str, ...]:
        """The arXiv numbers in the reference, the paper's own first."""
        return tuple(_ARXIV.findall(self.ref))

    @property
    def url(self) -> str:
        """Where the paper can be read, empty where the reference is no address."""
        if self.ref.startswith("arXiv:"):
            return f"https://arxiv.org/abs/{self.arxiv[0]}"
        place = self.ref.partition(";")[0]
        return f"https://{place}" if "." in place.partition("/")[0] and " " not in place else ""


def index(folder: Path | None = None) -> list[Entry]:
    """All papers, by family and year.

    Raises ValueError for a file without a readable `paper = Paper(...)`, a family that is not its folder, or two papers
    with one key.
    """
    root = folder or _FOLDER
    files = [path for path in root.glob("*/*.py") if not path.name.startswith("_")]
    files += root.glob("*/*/paper.py")
    entries = sorted((_read(path, root) for path in files), key=lambda entry: (entry.family, entry.year, entry.key))
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in seen:
            raise ValueError(f"{entry.module} and {seen[entry.key].module} both have the key {entry.key!r}; change one")
        seen[entry.key] = entry
    return entries


def lookup(name: str) -> list[Entry]:
    """Entries with a key, or with an arXiv number ("2106.09685", "arXiv:2106.09685", an address at arxiv.org).

    Several papers of the list may share an arXiv number. Raises ValueError that names the nearest keys.
    """
    entries = {entry.key: entry for entry in index()}
    if name in entries:
        return [entries[name]]
    number = _ARXIV.search(name)
    if number is None:
        raise ValueError(unknown("paper", name, entries))
    cited = [entry for entry in entries.values() if number.group() in entry.arxiv]
    if not cited:
        raise ValueError(f"no paper of the reading list refers to arXiv:{number.group()}; `paperworks list` shows all")
    return [entry for entry in cited if entry.arxiv[0] == number.group()] or cited


def find(name: str) -> Entry:
    """Entry of one paper, by key or arXiv number; raises ValueError for an unknown name or one of several papers."""
    entries = lookup(name)
    if len(entries) > 1:
        raise ValueError(f"{name} is the reference of {', '.join(entry.key for entry in entries)}; name one of them")
    return entries[0]


def load(name: str) -> Paper:
    """Import the module of one paper and return its `paper`; raises ValueError as `find` does."""
    module = importlib.import_module(find(name).module)
    paper: Paper = module.paper
    return paper


def _read(path: Path, root: Path) -> Entry:
    place = path.relative_to(root).with_suffix("").parts
    module = ".".join((__name__, *place))
    lines = path.read_text(encoding="utf-8").splitlines()
    values = _paper_values(lines, module)
    if (family := values.get("family", place[0])) != place[0]:
        raise ValueError(f"{module} says family={family!r} but lies in the folder {place[0]!r}; they must be the same")
    try:
        return Entry(**values, module=module, file=path, claims=tuple(_statements(lines, module)))
    except TypeError as error:
        raise ValueError(f"{module}: `paper = Paper(...)` does not have the fields of a paper: {error}") from error


def _paper_values(lines: list[str], module: str) -> dict[str, Any]:
    """Literal keyword arguments of `paper = Paper(...)`."""
    start = next((number for number, line in enumerate(lines) if line.startswith(_PAPER)), None)
    if start is None:
        raise ValueError(f"{module} has no statement `paper = Paper(...)` at its top level")
    statement = _statement(lines, start)
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"{module}: write `paper = Paper(key=..., title=..., ...)` with keyword arguments")
    return _literals(call, module, "paper = Paper(...)")


def _statement(lines: list[str], start: int) -> ast.stmt | None:
    """The statement that starts at a line, None where none is complete.

    Only the statements of interest are parsed: parsing 300 whole files takes longer than `paperworks list` may.
    """
    for end in range(start, len(lines)):
        if end == start or lines[end].startswith(")"):
            try:
                return ast.parse("\n".join(lines[start : end + 1])).body[0]
            except SyntaxError:  # goes on: a line of a text may start with a bracket
                continue
    return None


def _statements(lines: list[str], module: str) -> Iterator[Statement]:
    """The claims, from their decorators."""
    for start, line in enumerate(lines):
        if not line.startswith(_CLAIM):
            continue
        define = next((number for number in range(start, len(lines)) if lines[number].startswith("def ")), len(lines))
        name = "".join(lines[define : define + 1]).removeprefix("def ").partition("(")[0]
        call = _claim_call([*lines[start:define], f"def {name}(): ..."])
        if call is None or len(call.args) != 1:
            raise ValueError(f'{module}: write `@paper.claim("...", paper=..., ...)` above the function {name!r}')
        values = _literals(call, module, f"the claim {name!r}")
        statement = _literal(call.args[0], module, f"the claim {name!r}")
        kind = values.get("kind", "behaviour")
        reach = values.pop("reach", None) or ("small" if kind == "behaviour" else kind)
        try:
            yield Statement(name=name, statement=statement, reach=reach, **values)
        except TypeError as error:
            raise ValueError(f"{module}: the claim {name!r} does not have the fields of a claim: {error}") from error


def _claim_call(lines: list[str]) -> ast.Call | None:
    try:
        function = ast.parse("\n".join(lines)).body[0]
    except SyntaxError:
        return None
    first = function.decorator_list[0] if isinstance(function, ast.FunctionDef) else None
    return first if isinstance(first, ast.Call) else None


def _literals(call: ast.Call, module: str, what: str) -> dict[str, Any]:
    return {str(keyword.arg): _literal(keyword.value, module, what) for keyword in call.keywords}


def _literal(node: ast.expr, module: str, what: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{module}: the values in `{what}` must be literals ({error})") from error
