"""How the claims of a paper came out when they were last run, and whether that still counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paperworks.core.errors import CorruptFile
from paperworks.lab.progress import VERDICT_COLORS
from paperworks.lab.results import VERDICTS, Result, find_result
from paperworks.papers import Entry

NEVER = "never run"
DAMAGED = "damaged"
STATUSES = (*(verdict for verdict in VERDICTS if verdict != "ran"), NEVER, DAMAGED)
COLORS = {**VERDICT_COLORS, NEVER: "dim", DAMAGED: "red"}
LABELS = {"one seed": "one seed only"}  # what a reader sees where it is not the word of the record


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The recorded result of a paper; of two, the one that is current, the large scale before the small."""

    verdicts: dict[str, str] = field(default_factory=dict)  # claim, as the paper has them now -> verdict
    stale: bool = False  # the code has changed since
    result: Result | None = None
    damaged: str = ""  # what is wrong with the file

    @property
    def holding(self) -> int:
        """Number of claims that hold."""
        return sum(verdict == "holds" for verdict in self.verdicts.values())

    @property
    def statuses(self) -> set[str]:
        """The verdicts of the claims, or why there are none."""
        return {DAMAGED} if self.damaged else set(self.verdicts.values())

    def reproduced(self) -> str:
        """Such as "4 of 5 reproduced"."""
        if self.damaged:
            return "damaged file"
        return f"{self.holding} of {len(self.verdicts)} reproduced" if self.result else NEVER

    def marks(self) -> list[str]:
        """What limits the result: "stale", "3 on one seed"."""
        marks = ["stale"] if self.stale else []
        if lone := sum(verdict == "one seed" for verdict in self.verdicts.values()):
            marks.append(f"{lone} on one seed")
        return marks

    def color(self) -> str:
        """Of the count: green where every claim holds."""
        if self.damaged:
            return "red"
        if not self.holding:
            return "dim"
        return "green" if self.holding == len(self.verdicts) else "yellow"


def label(verdict: str) -> str:
    """A verdict as a reader sees it."""
    return LABELS.get(verdict, verdict)


def reach(entry: Entry) -> str:
    """How far the evidence of a paper's behaviours reaches, else that of its other claims; "real+small" is both."""
    behaviours = {claim.reach for claim in entry.claims if claim.kind == "behaviour"}
    return "+".join(sorted(behaviours or {claim.reach for claim in entry.claims}))


def recorded(entry: Entry, folders: Sequence[Path]) -> Recorded:
    """Recorded result of a paper, from the first of the folders that has one."""
    try:
        found = [find_result(folders, entry.key, scale) for scale in ("small", "large")]
    except CorruptFile as error:
        return Recorded(damaged=str(error), verdicts={claim.name: NEVER for claim in entry.claims})
    results = [result for result in found if result is not None]
    if not results:
        return Recorded(verdicts={claim.name: NEVER for claim in entry.claims})
    try:
        current = entry.fingerprint
    except ValueError:  # a part that exists no longer: the code has changed
        current = ""
    fresh = [result for result in results if result.fingerprint == current]
    result = (fresh or results)[-1]
    verdicts = {claim.name: claim.verdict for claim in result.claims}
    return Recorded(
        verdicts={claim.name: verdicts.get(claim.name, NEVER) for claim in entry.claims},
        stale=not fresh,
        result=result,
    )
