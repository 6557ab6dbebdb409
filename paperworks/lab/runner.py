"""Runs the claims of a paper: seeds, times, survives the one that fails, and records what came out."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from paperworks.core.errors import AssetUnavailable, unknown
from paperworks.lab.environment import describe_environment
from paperworks.lab.paper import Claim, Paper, Verdict
from paperworks.lab.progress import Board
from paperworks.lab.results import (
    SCALES,
    Outcome,
    Result,
    file_stem,
    load_result,
    recorded_seconds,
    results_folder,
    save_result,
    source_hash,
)
from paperworks.lab.workbench import Lab, Scale


def run(
    paper: Paper,
    scale: Scale = "small",
    seed: int = 0,
    *,
    only: Sequence[str] | None = None,
    device: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> Result:
    """Run a paper's claims in order and return the result; small and large ones are written to `out` or `results/`.

    A smoke run is written only when `out` is given, and so is a run of some claims (`only`). Ctrl-C stops, keeps the
    claims that were done (and what was recorded before of the others, if the module is the same) and is raised again.
    `quiet` shows no progress.
    """
    if scale not in SCALES:
        raise ValueError(unknown("scale", scale, SCALES))
    claims = _selected(paper, only)
    device = device or default_device(scale)
    result = Result(
        key=paper.key,
        scale=scale,
        seeds=[seed],
        environment=describe_environment(device),
        source_hash=source_hash(paper.source),
        claims=[],
    )
    folder = out or (results_folder() if scale != "smoke" and only is None else None)
    seconds = recorded_seconds(out or results_folder(), paper.key, scale)
    with Board([(claim.name, seconds.get(claim.name)) for claim in claims], title=paper.key, silent=quiet) as board:
        for index, claim in enumerate(claims):
            board.begin(index)
            try:
                outcome, images = run_claim(paper, claim, scale, seed, device=device, board=board)
            except KeyboardInterrupt:
                if folder is not None and result.claims:
                    save_result(_with_earlier(result, folder), folder)
                raise
            board.end(index, outcome.verdict, outcome.seconds)
            result.claims.append(outcome)
            result.images.update(images)
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
) -> tuple[Outcome, dict[str, bytes]]:
    """Run one claim from a fresh seed; returns its outcome and the figures it drew, by file name.

    What the claim raises becomes its verdict: "not run" for a missing asset, "error" for anything else.
    """
    lab = Lab(scale, seed, device or default_device(scale), stem=file_stem(paper.key, scale), board=board)
    seed_everything(seed)
    started = time.perf_counter()
    try:
        verdict = claim.examine(lab)
        status: str = verdict.status
    except AssetUnavailable as missing:
        verdict = Verdict(status="not run", note=str(missing))
        status = "not run"
    except Exception as error:  # any failure of one claim is that claim's result; the others go on
        verdict = Verdict(status="not run", note=_last_lines(error))
        status = "error"
    outcome = Outcome(
        name=claim.name,
        kind=claim.kind,
        statement=claim.statement,
        paper=claim.paper,
        measured=verdict.measured,
        control=verdict.control,
        verdict=status,
        seconds=round(time.perf_counter() - started, 3),
        figures=list(lab.images),
        note=verdict.note,
        checks=verdict.checks,
        texts=lab.texts,
        tables=lab.tables,
    )
    return outcome, lab.images


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy's legacy generator takes 32 bits
    torch.manual_seed(seed)


def default_device(scale: str) -> str:
    """Return the GPU for the large scale where there is one; the smaller scales are defined on the CPU."""
    import torch

    return "cuda" if scale == "large" and torch.cuda.is_available() else "cpu"


def _selected(paper: Paper, only: Sequence[str] | None) -> list[Claim]:
    known = {claim.name: claim for claim in paper.claims}
    for name in only or ():
        if name not in known:
            raise ValueError(unknown(f"claim of {paper.key!r}", name, known))
    return [claim for claim in paper.claims if only is None or claim.name in only]


def _with_earlier(result: Result, folder: Path) -> Result:
    """Complete an interrupted result with what was recorded before, where that is still about the same module."""
    earlier = load_result(folder, result.key, result.scale)
    if earlier is not None and earlier.source_hash == result.source_hash and earlier.seeds == result.seeds:
        done = {claim.name for claim in result.claims}
        result.claims += [claim for claim in earlier.claims if claim.name not in done]
    return result


def _last_lines(error: BaseException, frames: int = 3) -> str:
    """Return the end of a traceback with file names only, so that a result does not carry a machine's paths."""
    trail = traceback.extract_tb(error.__traceback__)[-frames:]
    lines = [f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}" for frame in trail]  # noqa: PTH119
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])
