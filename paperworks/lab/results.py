"""What the claims measured, as last run: one JSON file a paper, with its figures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.lab import fingerprint
from paperworks.lab.fingerprint import Source
from paperworks.lab.values import Value

SCALES = ("smoke", "small", "large")

# Verdicts, the best first: those of a claim's check, and "error" where the check failed to run.
VERDICTS = ("holds", "partly", "not reproduced", "one seed", "ran", "not run", "error")

PACKAGED = "_results"  # folder of the installed package that holds the results of its papers


@dataclass(kw_only=True)
class Outcome:
    """One claim after it was run: the verdict, its numbers, its exhibits and the seconds it took."""

    name: str
    kind: str
    reach: str
    statement: str
    paper: str
    measured: dict[str, Value]
    control: dict[str, Value] | None
    verdict: str  # a verdict's status, or "error"
    seconds: float
    seeds: list[int] = field(default_factory=list)  # of a comparison
    figures: list[str] = field(default_factory=list)  # file names in the results folder
    note: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    arms: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # arm -> metric -> value a seed
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # arm -> metric -> points, over seeds
    difference: str = ""
    interval: dict[str, float] | None = None  # of the difference: mean, low, high


@dataclass(frozen=True, kw_only=True)
class Design:
    """An earlier version of a paper's experiments: what it was, on which seeds, and how each claim came out."""

    hash: str
    scale: str
    seeds: list[int]
    verdicts: dict[str, str]  # claim -> verdict
    date: str = ""


@dataclass(kw_only=True)
class Result:
    """Contents of `results/<key>.json`; `images` are the figures' bytes by file name, kept only in memory."""

    key: str
    scale: str
    seeds: list[int]
    environment: dict[str, Value]
    fingerprint: str  # of what the paper computes
    claims: list[Outcome]
    earlier: list[Design] = field(default_factory=list)  # the oldest first
    sources: dict[str, Source] = field(default_factory=dict)  # files of the fingerprint
    choices: dict[str, str] = field(default_factory=dict)  # --model and --data, where the user gave them
    images: dict[str, bytes] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the images."""
        document = asdict(self)
        del document["images"]
        for source in document["sources"].values():
            source["uses"] = list(source["uses"])
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Result:
        """Result of its JSON form; raises KeyError or TypeError where a field is missing or not known."""
        values = {
            **document,
            "claims": [Outcome(**claim) for claim in document["claims"]],
            "earlier": [Design(**design) for design in document["earlier"]],
            "sources": {
                place: Source(text=source["text"], code=source["code"], uses=tuple(source["uses"]))
                for place, source in document["sources"].items()
            },
        }
        result = cls(**values)
        for name in ("key", "scale", "fingerprint"):
            if not isinstance(getattr(result, name), str):
                raise TypeError(f"{name!r} is {getattr(result, name)!r}, not a text")
        return result

    @property
    def holding(self) -> int:
        """Number of claims that hold."""
        return sum(claim.verdict == "holds" for claim in self.claims)

    @property
    def seconds(self) -> float:
        """Seconds of all claims."""
        return sum(claim.seconds for claim in self.claims)

    @property
    def design_number(self) -> int:
        """How many designs there were, this one included."""
        return len({design.hash for design in self.earlier} | {self.fingerprint})

    def as_design(self) -> Design:
        """This result as it is remembered after another one has taken its place."""
        return Design(
            hash=self.fingerprint,
            scale=self.scale,
            seeds=self.seeds,
            verdicts={claim.name: claim.verdict for claim in self.claims},
            date=str(self.environment.get("date", "")),
        )


def succeeding(result: Result, recorded: Result | None) -> Result:
    """The result with the history of the recorded one that it replaces.

    A recorded result of another fingerprint becomes the last entry of `earlier`, unless it stands there already.
    """
    if recorded is None:
        return result
    earlier = list(recorded.earlier)
    known = {design.hash for design in earlier}
    if recorded.fingerprint != result.fingerprint and recorded.fingerprint not in known:
        earlier.append(recorded.as_design())
    return replace(result, earlier=earlier)


def results_folder(start: Path | None = None) -> Path:
    """Folder for results: `results/` of the checkout around `start` (default: here), else `results/` right here."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "paperworks" / "papers").is_dir():
            return folder / "results"
    return here / "results"


def reading_folders(start: Path | None = None) -> tuple[Path, ...]:
    """Folders in which a recorded result is looked for, in this order.

    `results_folder`, and outside of a checkout also the results that came with the package.
    """
    folder = results_folder(start)
    if (folder.parent / "paperworks" / "papers").is_dir():
        return (folder,)
    packaged = fingerprint.PACKAGE / PACKAGED
    beside = fingerprint.PACKAGE.parent
    if not packaged.is_dir() and (beside / "pyproject.toml").is_file():  # installed from a checkout, in place
        packaged = beside / "results"
    return (folder, packaged)


def file_stem(key: str, scale: str) -> str:
    """First part of the names of a result's files; the small scale is the default and stays unnamed."""
    return key if scale == "small" else f"{key}.{scale}"


def load_result(folder: Path, key: str, scale: str = "small") -> Result | None:
    """Recorded result of a paper, None where there is none; raises CorruptFile where the file is damaged."""
    path = folder / f"{file_stem(key, scale)}.json"
    if not path.is_file():
        return None
    try:
        result = Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} is not a paperworks result ({type(error).__name__}: {error}); restore it from version control, or "
            f"delete it (its earlier designs go with it) and run `paperworks run {key}`"
        ) from error
    fingerprint.learn(result.sources)
    return result


def find_result(folders: Sequence[Path], key: str, scale: str = "small") -> Result | None:
    """Recorded result in the first of the folders that has one; raises CorruptFile where that file is damaged."""
    for folder in folders:
        if (result := load_result(folder, key, scale)) is not None:
            return result
    return None


def recorded_seconds(folders: Sequence[Path], key: str, scale: str) -> dict[str, float]:
    """Seconds of each claim when it was last recorded; empty where there is no readable record."""
    try:
        result = find_result(folders, key, scale)
    except CorruptFile:  # only an estimate is lost
        return {}
    return {claim.name: claim.seconds for claim in result.claims} if result else {}


def save_result(result: Result, folder: Path) -> Path:
    """Write the figures and then the JSON, each whole or not at all; figures no longer named are removed.

    What was recorded before stays in `earlier`. Raises CorruptFile where the recorded file is damaged: replacing it
    would lose its history.
    """
    result = succeeding(result, load_result(folder, result.key, result.scale))
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
