"""The deep-learning reading list, running: every paper a composable part, every claim checked.

import paperworks as pw
model = pw.load("smollm2")
pw.generate(model, ["Once upon a time"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperworks.api import build as build
    from paperworks.api import chat as chat
    from paperworks.api import count_parameters as count_parameters
    from paperworks.api import export as export
    from paperworks.api import generate as generate
    from paperworks.api import load as load
    from paperworks.api import preset as preset
    from paperworks.api import presets as presets
    from paperworks.api import save as save

__version__ = "0.1.0"

_OFFERED = ("build", "chat", "count_parameters", "export", "generate", "load", "preset", "presets", "save")
__all__ = list(_OFFERED)


def __getattr__(name: str) -> Any:
    # imported when asked for: `import paperworks` and `paperworks list` stay free of torch
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("paperworks.api"), name)
