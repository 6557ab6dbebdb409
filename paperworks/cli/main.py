"""Finds the command that was asked for, runs it, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from paperworks.core.errors import AssetUnavailable, CorruptFile, unknown

# Name: (module with `main(arguments) -> exit code`, one line of help).
COMMANDS = {
    "tour": ("paperworks.cli.tour", "run the landmark claims and write a report to look at"),
    "list": ("paperworks.cli.reading_list", "show the reading list and how its claims came out"),
    "show": ("paperworks.cli.show", "show one paper: summary, parts, claims and results"),
    "run": ("paperworks.cli.run", "check the claims of papers and record the results"),
    "refresh": ("paperworks.cli.refresh", "run the papers whose results are stale or missing"),
    "chat": ("paperworks.cli.chat", "talk to a model"),
    "sample": ("paperworks.cli.sample", "let a model continue a text"),
    "pretrain": ("paperworks.cli.pretrain", "train a model from nothing on a text"),
    "quantize": ("paperworks.cli.quantize", "store a model's layers in fewer bits and save it"),
    "inspect": ("paperworks.cli.inspect", "show what a model is made of, or what it makes of a prompt"),
    "features": ("paperworks.cli.features", "write a page of what a sparse autoencoder's features do"),
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 something failed, 2 a mistake in what was asked for.

    With PAPERWORKS_DEBUG set, errors keep their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"paperworks {version('paperworks')}")
        return 0
    try:
        return _dispatch(given[0], given[1:])
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; point stdout elsewhere so that closing it at exit stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AssetUnavailable, CorruptFile, ValueError, OSError) as error:
        if os.environ.get("PAPERWORKS_DEBUG"):
            raise
        print(f"paperworks: {error}", file=sys.stderr)
        return 2


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS))
    try:
        command = importlib.import_module(COMMANDS[name][0])
        code: int = command.main(rest)
        return code
    except SystemExit as stop:  # the parsers of the commands leave this way, after --help or a wrong option
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: paperworks COMMAND [OPTIONS]",
            "",
            "The deep-learning reading list, running.",
            "",
            *lines,
            "",
            "`paperworks COMMAND --help` tells the options of a command.",
        ]
    )
