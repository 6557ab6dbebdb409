"""Command lines from typed dataclasses; what several commands have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def parse(options: type[T], command: str, arguments: list[str]) -> T:
    """Read the arguments of a command into a dataclass; leaves with exit code 2 (0 after --help) when it cannot."""
    import tyro

    return tyro.cli(
        options,
        prog=f"paperworks {command}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        use_underscores=False,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """Most tokens to write."""
    temperature: float = 0.7
    """0 takes the most likely token; 1 samples as the model predicts."""
    top_k: int | None = None
    """Choose among so many most likely tokens."""
    top_p: float | None = None
    """Choose among the most likely tokens that make up this probability."""
    min_p: float | None = None
    """Choose among tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float | None = None
    """Divide the scores of tokens already written by this; above 1 discourages repetition."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same text."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop writing."""

    def settings(self) -> dict[str, Any]:
        """The keyword arguments for `generate` and `chat`; what was not given is left out."""
        values = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        return {
            name: list(value) if name == "stop" else value for name, value in values.items() if value not in (None, ())
        }
