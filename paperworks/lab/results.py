"""What the claims measured, as last run: one JSON file a paper, with its figures beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.lab.values import Value

SCALES = ("smoke", "small", "large")
WORST_FIRST = ("error", "does not hold", "partly", "not run", "holds")


@dataclass(kw_only=True)
class Outcome:
    """One claim after it was run: the verdict, its numbers, its exhibits and the seconds it took."""

    name: str
    kind: str
    statement: str
    paper: str
    measured: dict[str, Value]
    control: dict[str, Value] | None
    verdict: str  # a verdict's status, or "error"
    seconds: float
    figures: list[str] = field(default_factory=list)  # file names in the results folder
    note: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True)
class Result:
    """What `results/<key>.json` holds; `images` are the figures' bytes by file name, kept only in memory."""

    key: str
    scale: str
    seeds: list[int]
    environment: dict[str, Value]
    source_hash: str
    claims: list[Outcome]
    images: dict[str, bytes] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the images."""
        document = asdict(self)
        del document["images"]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Result:
        """Read the JSON form back; raises KeyError or TypeError where a field is missing or not known."""
        claims = [Outcome(**claim) for claim in document["claims"]]
        return cls(**{**document, "claims": claims})

    @property
    def status(self) -> str:
        """The verdict of the paper as a whole."""
        return combined_status(claim.verdict for claim in self.claims)


def combined_status(verdicts: Iterable[str]) -> str:
    """Return the worst of several verdicts ("not run" when there are none)."""
    seen = set(verdicts)
    return next((status for status in WORST_FIRST if status in seen), "not run")


def source_hash(source: Path) -> str:
    """Return the sha256 of a paper module's text."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def results_folder(start: Path | None = None) -> Path:
    """Return `results/` of the checkout that `start` (default: here) lies in, else `results/` right here."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "paperworks" / "papers").is_dir():
            return folder / "results"
    return here / "results"


def file_stem(key: str, scale: str) -> str:
    """Return how the files of a result begin; the small scale is the default and stays unnamed."""
    return key if scale == "small" else f"{key}.{scale}"


def load_result(folder: Path, key: str, scale: str = "small") -> Result | None:
    """Read a recorded result, or None where there is none; raises CorruptFile when it cannot be understood."""
    path = folder / f"{file_stem(key, scale)}.json"
    if not path.is_file():
        return None
    try:
        return Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} is not a paperworks result ({error}); delete it and run `paperworks run {key}`"
        ) from error


def recorded_seconds(folder: Path, key: str, scale: str) -> dict[str, float]:
    """Return how long each claim took when it was last recorded; nothing where there is no readable record."""
    try:
        result = load_result(folder, key, scale)
    except CorruptFile:  # the run that asks will write a good one
        return {}
    return {claim.name: claim.seconds for claim in result.claims} if result else {}


def save_result(result: Result, folder: Path) -> Path:
    """Write the figures and then the JSON, each whole or not at all; figures no longer named are removed."""
    stem = file_stem(result.key, result.scale)
    for name, content in result.images.items():
        with atomic.writing_file(folder / name) as temporary:
            temporary.write_bytes(content)
    path = folder / f"{stem}.json"
    previous = _figures_named_in(path)
    with atomic.writing_file(path) as temporary:
        text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    for name in previous - {figure for claim in result.claims for figure in claim.figures}:
        if name.startswith(f"{stem}-") and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    return path


def _figures_named_in(path: Path) -> set[str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(figure) for claim in document["claims"] for figure in claim["figures"]}
    except (OSError, ValueError, KeyError, TypeError):  # no earlier result, or a damaged one: nothing to tidy up
        return set()
