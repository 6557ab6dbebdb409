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
from paperworks.papers import load, lookup


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check the claims of papers and record the results."""

    keys: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY [KEY ...]")]
    """Which papers, by the keys of `paperworks list` or by arXiv number."""
    scale: Literal["smoke", "small", "large"] = "small"
    """smoke: seconds, only to see that it runs, not recorded; small: minutes on a laptop; large: a big GPU."""
    seed: int = 0
    """First seed. Another than 0 is not the experiment as designed and is written to out/."""
    design: bool = False
    """Try the experiments on seeds from 100 up and record nothing: for one that is still being designed."""
    model: str | None = None
    """Run claims about a language model on this one, a name or path; written to out/, never into the results."""
    data: Path | None = None
    """Run claims on this file of data; written to out/, never into the results."""
    out: Path | None = None
    """Where to write results (default: the results folder of the checkout)."""
    json: bool = False
    """Print the results as JSON."""


def main(arguments: list[str]) -> int:
    """Run the papers one after the other; 1 when a claim ended in an error."""
    options = parse(Options, "run", arguments)
    if not options.keys:
        raise ValueError("say which papers to run, for example `paperworks run grokking`; `paperworks list` shows all")
    if options.design and (options.out is not None or options.scale == "smoke"):
        raise ValueError(
            "--design tries an experiment at its full scale and records nothing; leave --out and smoke out"
        )
    # All names are looked up before the first minute of work.
    keys = [entry.key for name in options.keys for entry in lookup(name)]
    results = [_run(key, options) for key in keys]
    if options.json:
        documents = [result.to_dict() for result in results]
        print(json.dumps(documents if len(documents) > 1 else documents[0], indent=1, ensure_ascii=False))
    else:
        _print(results, options)
    return 1 if any(claim.verdict == "error" for result in results for claim in result.claims) else 0


def _run(key: str, options: Options) -> Result:
    from paperworks.lab.runner import Choices, run

    return run(
        load(key),
        options.scale,
        options.seed,
        out=options.out,
        design=options.design,
        choices=Choices(model=options.model, data=options.data),
    )


def _print(results: list[Result], options: Options) -> None:
    print_outcomes([(result.key, claim) for result in results for claim in result.claims])
    if options.scale == "smoke" and options.out is None:
        print("A smoke run only shows that the claims run; its numbers mean nothing and are not recorded.")
        return
    if options.design:
        print("A design run tries seeds from 100 up and is not recorded; `paperworks run` judges on seeds 0, 1, 2, ...")
        return
    from paperworks.lab.runner import BESIDE

    beside = options.model is not None or options.data is not None or options.seed != 0
    folder = options.out or (BESIDE if beside else results_folder())
    for result in results:
        print(folder / f"{file_stem(result.key, result.scale)}.json")
