"""Public data sets by name: text to model, and records to learn or to be tested on.

A file is looked for in the cache, then in the folders of PAPERWORKS_DATA, then, only when asked, where it is published;
which of these it was is said in the result. "python-docs" needs no file: it is prose that comes with every Python.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import os
import platform
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperworks.core.atomic import writing_file
from paperworks.core.errors import AssetUnavailable, CorruptFile, unknown
from paperworks.data.assets.assets import cache_folder
from paperworks.data.text.sources import SOURCES, DataSource

log = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"
_MOST_BYTES = 1 << 26  # of a download; the largest data set here has 4 MB


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    text: str
    origin: str


@dataclass(frozen=True)
class Records:
    """A data set of records (dicts, or strings where the file is a list of them) and where it came from."""

    name: str
    rows: list[Any]
    origin: str


def names() -> list[str]:
    """List the known data sets."""
    return sorted([*SOURCES, PYTHON_DOCS])


def load_text(name: str, *, download: bool = False) -> Text:
    """A data set as one text.

    "python-docs" is the language reference that Python's own `help` shows (`pydoc_data.topics`): about half a
    megabyte of English prose and code, a little different in each Python version.

    Raises:
        ValueError: no such data set; names the nearest.
        AssetUnavailable: its file is nowhere to be had; says how to provide it.
        CorruptFile: the file found is not the published one.
    """
    if name == PYTHON_DOCS:
        return _python_docs()
    content, origin = _content(_source(name), download)
    return Text(name, content.decode("utf-8"), origin)


def load_records(name: str, *, download: bool = False) -> Records:
    """A data set as a list of rows, from JSON lines, JSON or CSV (whose values stay text); see `load_text`."""
    source = _source(name)
    content, origin = _content(source, download)
    return Records(name, _rows(source, content.decode("utf-8")), origin)


def split(text: str, validation: float = 0.1) -> tuple[str, str]:
    """Cut a text in two by position: the first part to train on, the last `validation` of the characters to test on."""
    if not 0 < validation < 1:
        raise ValueError(f"validation is the fraction to keep for validation, between 0 and 1, got {validation}")
    cut = len(text) - round(len(text) * validation)
    return text[:cut], text[cut:]


def _source(name: str) -> DataSource:
    if name not in SOURCES:
        raise ValueError(unknown("data set", name, names()))
    return SOURCES[name]


def _python_docs() -> Text:
    from pydoc_data import topics

    origin = f"pydoc_data.topics of Python {platform.python_version()}"
    log.info("data set %s from %s", PYTHON_DOCS, origin)
    return Text(PYTHON_DOCS, "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics)), origin)


def _content(source: DataSource, download: bool) -> tuple[bytes, str]:
    """A file's verified and unpacked bytes, and where they came from."""
    stored = cache_folder() / "data" / source.file
    folders = [Path(entry).expanduser() for entry in os.environ.get("PAPERWORKS_DATA", "").split(os.pathsep) if entry]
    for path in (stored, *(folder / source.file for folder in folders)):
        if path.is_file():
            raw, origin = path.read_bytes(), str(path)
            break
    else:
        raw, origin = _download(source, stored, folders, download), source.published
    _verify(source, raw, origin)
    if origin == source.published:
        with writing_file(stored) as place:
            place.write_bytes(raw)
    log.info("data set %s from %s", source.name, origin)
    return _unpacked(source, raw, origin), origin


def _download(source: DataSource, stored: Path, folders: list[Path], wanted: bool) -> bytes:
    provide = f"put the file of {source.published} (sha256 {source.sha256[:12]}...) at {stored}"
    provide += f" or at {source.file} in {' or '.join(map(str, folders)) or 'a folder named by PAPERWORKS_DATA'}"
    if not wanted:
        raise AssetUnavailable(f"the data set {source.name!r} is not here: {provide}, or ask with download=True.")
    if os.environ.get("PAPERWORKS_OFFLINE", "") not in ("", "0"):
        raise AssetUnavailable(
            f"the data set {source.name!r} is not here and PAPERWORKS_OFFLINE forbids to download it: {provide}."
        )
    url = f"https://raw.githubusercontent.com/{source.repository}/HEAD/{source.path}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content: bytes = answer.read(_MOST_BYTES)
    except OSError as error:
        raise AssetUnavailable(f"the data set {source.name!r} could not be downloaded ({error}): {provide}.") from error
    return content


def _verify(source: DataSource, raw: bytes, origin: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != source.sha256:
        raise CorruptFile(
            f"{origin} is not the published data set {source.name!r} (sha256 {found[:12]}..., not "
            f"{source.sha256[:12]}...); get it again from {source.published}"
        )


def _unpacked(source: DataSource, raw: bytes, origin: str) -> bytes:
    if not source.file.endswith(".gz"):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptFile(f"{origin} cannot be unpacked: {error}") from error


def _rows(source: DataSource, text: str) -> list[Any]:
    file = source.file.removesuffix(".gz")
    if file.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # other line ends may be in strings
    if file.endswith(".json"):
        rows = json.loads(text)
        return rows if isinstance(rows, list) else [rows]
    if file.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return text.splitlines()
