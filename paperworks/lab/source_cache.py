"""Hashes of source files remembered between calls of the command line, so that nothing is parsed twice.

Entries are by the hash of a file's text and of this package's own way of hashing: they cannot be out of date. A cache
that is missing, damaged or cannot be written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from paperworks.core import atomic
from paperworks.lab import fingerprint
from paperworks.lab.fingerprint import Source

MOST = 5_000  # sources kept; beyond, the cache begins again


def path() -> Path:
    """Where the cache lies: in PAPERWORKS_CACHE, or the user's cache folder."""
    folder = os.environ.get("PAPERWORKS_CACHE") or Path.home() / ".cache" / "paperworks"
    return Path(folder) / "sources.json"


def load() -> int:
    """Read what is remembered; returns the number of sources."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        if content["method"] != _method():
            return 0
        sources = {
            text: Source(text=text, code=code, uses=tuple(uses)) for text, (code, uses) in content["sources"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
    fingerprint.learn(sources)
    return len(sources)


def save(before: int) -> None:
    """Write what is known now, if it is more than `before` sources."""
    known = fingerprint.known()
    if len(known) <= before:
        return
    sources = {text: (source.code, list(asdict(source)["uses"])) for text, source in list(known.items())[-MOST:]}
    try:
        with atomic.writing_file(path()) as out:
            out.write_text(json.dumps({"method": _method(), "sources": sources}), encoding="utf-8")
    except OSError:
        return  # a read-only home is no reason to fail


def _method() -> str:
    return hashlib.sha256(Path(fingerprint.__file__).read_bytes()).hexdigest()
