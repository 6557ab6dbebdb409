"""Runs the claims of a paper: seeds, times, survives the one that fails, and records what came out."""

from __future__ import annotations

import ast
import os
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from paperworks.core.errors import AssetUnavailable, unknown
from paperworks.lab.environment import describe_environment
from paperworks.lab.fingerprint import Fingerprint, fingerprint
from paperworks.lab.paper import Claim, Paper, Verdict
from paperworks.lab.progress import Board, duration
from paperworks.lab.results import (
    SCALES,
    Outcome,
    Result,
    file_stem,
    load_result,
    reading_folders,
    recorded_seconds,
    results_folder,
    save_result,
    succeeding,
)
from paperworks.lab.seeding import DESIGN_SEED, seed_everything
from paperworks.lab.stopwatch import Stopwatch
from paperworks.lab.workbench import Lab, Scale

BESIDE = Path("out")  # where runs go that are not the paper's own experiment as designed

CLAIM_SECONDS, PAPER_SECONDS = 180, 360  # budget at the small scale, on two cores


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user runs a paper's claims on instead of what the claims name: a model, a file of data."""

    model: str | None = None
    data: Path | None = None

    def __bool__(self) -> bool:
        return self.model is not None or self.data is not None


def run(
    paper: Paper,
    scale: Scale = "small",
    seed: int = 0,
    *,
    only: Sequence[str] | None = None,
    device: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
    design: bool = False,
    choices: Choices | None = None,
    record: bool = True,
) -> Result:
    """Run a paper's claims in order and return the result; small and large ones are written to `out` or `results/`.

    Args:
        paper: whose claims to run.
        scale: smoke, small or large.
        seed: the first seed.
        only: names of claims; then nothing is written unless `out` is given.
        device: where to compute; default the GPU at the large scale, else the CPU.
        out: folder to write to. Default: `results/` for the experiment as designed; `out/` with another first seed or
            with `choices`; nothing at the smoke scale.
        quiet: show no progress.
        design: try the experiments on seeds from 100 up and write nothing.
        choices: run on the user's model or data; claims that do not use the choice are left out.
        record: False writes nothing, for a run whose result is recorded elsewhere.

    Ctrl-C stops, keeps the claims that were done (and what was recorded before of the others, if the code is the same)
    and is raised again.

    Raises ValueError for an unknown scale or claim, choices that no claim uses, or a file with no readable fingerprint;
    CorruptFile where the recorded result is damaged.
    """
    if scale not in SCALES:
        raise ValueError(unknown("scale", scale, SCALES))
    claims = _selected(paper, only)
    choices = choices or Choices()
    print_of = fingerprint(paper.source, paper.implements)
    _check_choices(paper, choices, print_of)
    if design:
        seed, record = seed + DESIGN_SEED, False
    folder = _folder(scale, seed, only, out, choices) if record else None
    recorded = load_result(folder, paper.key, scale) if folder is not None else None
    device = device or default_device(scale)
    result = Result(
        key=paper.key,
        scale=scale,
        seeds=[seed],
        environment=describe_environment(device),
        fingerprint=print_of.code,
        sources=print_of.sources,
        claims=[],
    )
    seconds = recorded_seconds([out] if out else reading_folders(), paper.key, scale)
    with Board([(claim.name, seconds.get(claim.name)) for claim in claims], title=paper.key, silent=quiet) as board:
        for index, claim in enumerate(claims):
            board.begin(index)
            lab = _lab(paper, scale, seed, device, board, choices, drawn=result.images)
            try:
                outcome = _examine(claim, lab)
            except KeyboardInterrupt:
                if folder is not None and result.claims:
                    save_result(_completed(result, recorded), folder)
                raise
            board.end(index, outcome.verdict, outcome.seconds)
            if choices and not lab.choices and outcome.verdict != "error":
                continue
            _add(result, outcome, lab)
            _warn_of_budget(board, paper, scale, f"claim {claim.name}", outcome.seconds, CLAIM_SECONDS)
        _warn_of_budget(board, paper, scale, f"paper {paper.key}", result.seconds, PAPER_SECONDS)
    result = succeeding(result, recorded)
    if folder is not None:
        save_result(result, folder)
    return result


def run_claim(
    paper: Paper,
    claim: Claim,
    scale: Scale = "small",
    seed: int = 0,
    *,
    device: str | None = None,
    board: Board | None = None,
    most_seeds: int | None = None,
) -> tuple[Outcome, dict[str, bytes]]:
    """Run one claim; returns its outcome and the figures it drew, by file name.

    What the claim raises becomes its verdict: "not run" for a missing asset, "error" for anything else. `most_seeds`
    limits the seeds of a comparison.
    """
    lab = _lab(paper, scale, seed, device or default_device(scale), board, Choices(), most_seeds)
    return _examine(claim, lab), lab.images


def _lab(
    paper: Paper,
    scale: Scale,
    seed: int,
    device: str,
    board: Board | None,
    choices: Choices,
    most_seeds: int | None = None,
    drawn: Collection[str] = (),
) -> Lab:
    return Lab(
        scale,
        seed,
        device,
        stem=file_stem(paper.key, scale),
        board=board,
        most_seeds=most_seeds,
        model=choices.model,
        data=choices.data,
        drawn=drawn,
    )


def _examine(claim: Claim, lab: Lab) -> Outcome:
    seed_everything(lab.seed)
    watch = Stopwatch()
    try:
        verdict = claim.examine(lab)
        status = _binding_status(claim, verdict, lab.scale)
    except AssetUnavailable as missing:
        verdict = Verdict(status="not run", note=str(missing))
        status = "not run"
    except Exception as error:  # any failure of one claim is that claim's result; the others go on
        verdict = Verdict(status="not run", note=_last_lines(error))
        status = "error"
    return Outcome(
        name=claim.name,
        kind=claim.kind,
        reach=claim.reach,
        statement=claim.statement,
        paper=claim.paper,
        measured=verdict.measured,
        control=verdict.control,
        verdict=status,
        seconds=round(watch.seconds(), 3),
        seeds=list(verdict.seeds),
        figures=list(lab.images),
        note=verdict.note,
        checks=verdict.checks,
        texts=lab.texts,
        tables=lab.tables,
        arms=verdict.arms,
        curves=verdict.curves,
        difference=verdict.difference,
        interval=verdict.interval,
    )


def _binding_status(claim: Claim, verdict: Verdict, scale: str) -> str:
    """The verdict as far as it binds: nothing at the smoke scale, a behaviour only on two seeds or more."""
    if verdict.status == "not run":
        return "not run"
    if scale == "smoke":
        return "ran"
    if claim.kind == "behaviour" and len(verdict.seeds) < 2 and verdict.status in ("holds", "partly"):
        return "one seed"
    return verdict.status


def _add(result: Result, outcome: Outcome, lab: Lab) -> None:
    result.claims.append(outcome)
    result.images.update(lab.images)
    result.choices.update(lab.choices)
    result.seeds = sorted({*result.seeds, *outcome.seeds})


def _folder(scale: str, seed: int, only: Sequence[str] | None, out: Path | None, choices: Choices) -> Path | None:
    """Where the result is written, None for nowhere."""
    if choices and out is not None and out.resolve() == results_folder().resolve():
        raise ValueError(f"{out} holds the results of the papers' own experiments; write a run of your own elsewhere")
    if out is not None:
        return out
    if scale == "smoke" or only is not None:
        return None
    return BESIDE if choices or seed != 0 else results_folder()


_ASKS = {"model": ("model_name", "a language model"), "data": ("data_file", "a data file")}


def _check_choices(paper: Paper, choices: Choices, print_of: Fingerprint) -> None:
    """Refuse a choice that no claim can use, before anything runs."""
    if choices.data is not None and not choices.data.exists():
        raise ValueError(f"--data {choices.data}: there is no such file")
    for name, (method, thing) in _ASKS.items():
        if getattr(choices, name) is None:
            continue
        trees = [ast.parse(path.read_bytes()) for path in print_of.files]
        asks = any(isinstance(node, ast.Attribute) and node.attr == method for tree in trees for node in ast.walk(tree))
        if not asks:
            raise ValueError(f"no claim of {paper.key} speaks of {thing}, so --{name} has nothing to act on")


def _warn_of_budget(board: Board, paper: Paper, scale: str, what: str, seconds: float, budget: int) -> None:
    if scale == "small" and seconds > budget and not paper.budget_exception:
        board.say(
            f"{what} took {duration(seconds)}, over the budget of {duration(budget)} at the small scale; make the "
            "experiment smaller, or say why not in budget_exception= of the paper"
        )


def default_device(scale: str) -> str:
    """The GPU for the large scale where there is one, else the CPU, for which the smaller scales are defined."""
    import torch

    return "cuda" if scale == "large" and torch.cuda.is_available() else "cpu"


def _selected(paper: Paper, only: Sequence[str] | None) -> list[Claim]:
    known = {claim.name: claim for claim in paper.claims}
    for name in only or ():
        if name not in known:
            raise ValueError(unknown(f"claim of {paper.key!r}", name, known))
    return [claim for claim in paper.claims if only is None or claim.name in only]


def _completed(result: Result, recorded: Result | None) -> Result:
    """Complete an interrupted result with what was recorded before, where that is about the same code."""
    if recorded is not None and recorded.fingerprint == result.fingerprint and recorded.seeds[0] == result.seeds[0]:
        done = {claim.name for claim in result.claims}
        result.claims += [claim for claim in recorded.claims if claim.name not in done]
    return result


def _last_lines(error: BaseException, frames: int = 3) -> str:
    """End of a traceback with file names only, so that a result does not carry a machine's paths."""
    trail = traceback.extract_tb(error.__traceback__)[-frames:]
    lines = [f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}" for frame in trail]  # noqa: PTH119
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])
