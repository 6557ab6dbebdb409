"""`paperworks run KEY ...`: check the claims of papers and record what came out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from paperworks.cli.options import parse
from paperworks.cli.table import print_outcomes
from paperworks.lab.results import Result, file_stem, results_folder
from paperworks.papers import find, load


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check the claims of papers and record the results."""

    keys: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY [KEY ...]")]
    """Which papers, by the keys of `paperworks list`."""
    scale: Literal["smoke", "small", "large"] = "small"
    """smoke: seconds, only to see that it runs, not recorded; small: minutes on a laptop; large: a big GPU."""
    seed: int = 0
    """Seed of every claim."""
    out: Path | None = None
    """Where to write results (default: the results folder of the checkout)."""
    json: bool = False
    """Print the results as JSON."""


def main(arguments: list[str]) -> int:
    """Run the papers one after the other; 1 when a claim ended in an error."""
    options = parse(Options, "run", arguments)
    if not options.keys:
        raise ValueError("say which papers to run, for example `paperworks run grokking`; `paperworks list` shows all")
    for key in options.keys:
        find(key)  # all keys are looked at before the first minute of work
    results = [_run(key, options) for key in options.keys]
    if options.json:
        documents = [result.to_dict() for result in results]
        print(json.dumps(documents if len(documents) > 1 else documents[0], indent=1, ensure_ascii=False))
    else:
        _print(results, options)
    return 1 if any(claim.verdict == "error" for result in results for claim in result.claims) else 0


def _run(key: str, options: Options) -> Result:
    from paperworks.lab.runner import run

    return run(load(key), options.scale, options.seed, out=options.out)


def _print(results: list[Result], options: Options) -> None:
    print_outcomes([(result.key, claim) for result in results for claim in result.claims])
    if options.scale == "smoke" and options.out is None:
        print("A smoke run only shows that the claims run; its numbers mean nothing and are not recorded.")
        return
    folder = options.out or results_folder()
    for result in results:
        print(folder / f"{file_stem(result.key, result.scale)}.json")
