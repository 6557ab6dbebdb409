"""JSON files that hold one object, read with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paperworks.core.errors import CorruptFile


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CorruptFile: when the file is not JSON in UTF-8, or holds something else than an object.
        FileNotFoundError: when there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not valid JSON: {error}; fetch or write it again") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} should hold a JSON object, it holds a {type(content).__name__}")
    return content
