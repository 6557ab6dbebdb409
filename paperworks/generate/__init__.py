"""Decoding: sampling, beam search, text; the same code for every mixer.

The room is also the function: `paperworks.generate(model, prompts, ...)` calls `generate` of this module.
"""

import sys
from types import ModuleType
from typing import Any

from paperworks.generate.any_order import Filled, conditionals, fill
from paperworks.generate.beam import beam_search
from paperworks.generate.decoding import decode
from paperworks.generate.sampling import Sampling, penalize_repetition
from paperworks.generate.text import generate

__all__ = [
    "Filled",
    "Sampling",
    "beam_search",
    "conditionals",
    "decode",
    "fill",
    "generate",
    "penalize_repetition",
]


class _CallableRoom(ModuleType):
    """Importing a room binds its name in the package, so `paperworks.generate` is this module: let it be called."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return generate(*arguments, **settings)


sys.modules[__name__].__class__ = _CallableRoom
