"""How a paper of the reading list came out when it was last run, and whether that still counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paperworks.core.errors import CorruptFile
from paperworks.lab.results import Result, load_result
from paperworks.papers import Entry

NEVER = "never run"
STATUSES = ("holds", "partly", "does not hold", "not run", "error", NEVER)
COLORS = {"holds": "green", "partly": "yellow", "does not hold": "red", "error": "red", "not run": "dim", NEVER: "dim"}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The last result of a paper, large scale before small."""

    status: str
    holding: int = 0
    stale: bool = False  # the module has changed since
    result: Result | None = None

    def markup(self) -> str:
        """Return the status for a rich table."""
        mark = " [magenta](stale)[/]" if self.stale else ""
        return f"[{COLORS[self.status]}]{self.status}[/]{mark}"


def recorded(entry: Entry, folder: Path) -> Recorded:
    """Read the recorded result of a paper from the results folder; an unreadable file counts as an error."""
    try:
        found = [load_result(folder, entry.key, scale) for scale in ("small", "large")]
    except CorruptFile:
        return Recorded(status="error")
    results = [result for result in found if result is not None]
    if not results:
        return Recorded(status=NEVER)
    fresh = [result for result in results if result.source_hash == entry.source_hash]
    result = (fresh or results)[-1]
    return Recorded(
        status=result.status,
        holding=sum(claim.verdict == "holds" for claim in result.claims),
        stale=not fresh,
        result=result,
    )
