"""`paperworks refresh`: runs the papers whose recorded result is stale or missing, the cheapest first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from paperworks.cli.options import parse
from paperworks.cli.recorded import NEVER, recorded
from paperworks.core.errors import CorruptFile, unknown
from paperworks.lab import cluster
from paperworks.lab.fingerprint import fingerprint
from paperworks.lab.progress import duration
from paperworks.lab.results import Result, load_result, results_folder, save_result
from paperworks.papers import Entry, index, load, lookup

UNKNOWN_SECONDS = 360.0  # the budget of a paper at the small scale


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the papers whose code has changed since they were run, and those never run, the cheapest first."""

    keys: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY ...]")] = ()
    """Only these papers (default: all)."""
    family: str | None = None
    """Only papers of this family."""
    minutes: float = 10.0
    """No paper is started that is not expected to end within this time."""
    ray: str | None = None
    """Run on the Ray cluster at this address, such as "auto" or "ray://head:10001"; "local" starts one here."""
    dry_run: bool = False
    """Only show what would be run, and the seconds it took when it was last recorded."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A paper to run: why, and how long it took last time."""

    key: str
    reason: str  # "stale", "never run"
    seconds: float | None

    @property
    def expected(self) -> float:
        """Seconds to plan with."""
        return UNKNOWN_SECONDS if self.seconds is None else self.seconds

    def __str__(self) -> str:
        took = "unknown time" if self.seconds is None else f"about {duration(self.seconds)}"
        return f"{self.key} ({self.reason}, {took})"


def main(arguments: list[str]) -> int:
    """Run what is stale or missing as far as the time allows; 1 when a claim ended in an error."""
    options = parse(Options, "refresh", arguments)
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes}; give a time above 0")
    folder = results_folder()
    entries = _selected(options)
    jobs = plan(entries, folder)
    if options.dry_run or not jobs:
        print("\n".join(map(str, jobs)) or f"All {len(entries)} papers are up to date.")
        return 0
    return _refresh(jobs, options, folder)


def _selected(options: Options) -> list[Entry]:
    entries = [entry for name in options.keys for entry in lookup(name)] if options.keys else index()
    families = {entry.family for entry in index()}
    if options.family is not None and options.family not in families:
        raise ValueError(unknown("family", options.family, families))
    return [entry for entry in entries if options.family in (None, entry.family)]


def plan(entries: list[Entry], folder: Path) -> list[Job]:
    """Papers to run, the cheapest first, those of unknown time last.

    A result whose code computes the same, although files have moved or been reworded, is kept: only its record of the
    files is renewed.
    """
    jobs = []
    for entry in entries:
        record = recorded(entry, (folder,))
        if record.damaged:
            print(record.damaged)
            continue
        if record.result is None or NEVER in record.verdicts.values():
            reason = NEVER
        elif record.stale:
            reason = "stale"
        else:
            _renew_sources(entry, record.result, folder)
            continue
        small = load_result(folder, entry.key)
        jobs.append(Job(key=entry.key, reason=reason, seconds=small.seconds if small and small.claims else None))
    return sorted(jobs, key=lambda job: (job.seconds is None, job.seconds or 0.0, job.key))


def _renew_sources(entry: Entry, result: Result, folder: Path) -> None:
    sources = fingerprint(entry.file, entry.implements).sources
    if sources != result.sources:
        save_result(replace(result, sources=sources), folder)


def judge(key: str) -> Result:
    """Result of one paper, not written; runs wherever the cluster puts it."""
    from paperworks.lab.runner import run

    return run(load(key), quiet=True, record=False)


def _refresh(jobs: list[Job], options: Options, folder: Path) -> int:
    started = time.monotonic()
    done: list[Result] = []
    failed: list[str] = []
    try:
        fitting = _fitting(jobs, options.minutes, started)
        for job, outcome in _here(fitting) if options.ray is None else _on_cluster(fitting, options.ray, folder):
            if isinstance(outcome, CorruptFile | OSError | ValueError):
                failed.append(f"{job.key}: {outcome}")
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                done.append(outcome)
                print(_line(outcome, time.monotonic() - started), flush=True)
    finally:  # also after Ctrl-C: what is done is recorded, and said
        left = len(jobs) - len(done) - len(failed)
        print("\n".join([*failed, f"{len(done)} papers run in {duration(time.monotonic() - started)}, {left} left."]))
    return 1 if failed or any(claim.verdict == "error" for result in done for claim in result.claims) else 0


def _fitting(jobs: list[Job], minutes: float, started: float) -> Iterator[Job]:
    """Jobs, as long as the next one is expected to end in time; the jobs come cheapest first."""
    for number, job in enumerate(jobs):
        left = 60 * minutes - (time.monotonic() - started)
        if job.expected > left:
            print(f"{len(jobs) - number} papers do not fit into the {duration(max(left, 0))} left; next is {job}")
            return
        yield job


def _here(jobs: Iterator[Job]) -> Iterator[tuple[Job, Result | Exception]]:
    from paperworks.lab.runner import run

    for job in jobs:
        print(f"running {job}", flush=True)
        try:
            yield job, run(load(job.key))
        except (CorruptFile, OSError, ValueError) as error:  # of this paper; the others go on
            yield job, error


def _on_cluster(jobs: Iterator[Job], address: str, folder: Path) -> Iterator[tuple[Job, Result | Exception]]:
    for job, outcome in cluster.completed(_judge_job, jobs, address, cpus=1):
        if isinstance(outcome, Result):
            save_result(outcome, folder)
        yield job, outcome


def _judge_job(job: Job) -> Result:
    return judge(job.key)


def _line(result: Result, elapsed: float) -> str:
    verdicts = ", ".join(f"{claim.name} {claim.verdict}" for claim in result.claims)
    return f"{result.key}: {result.holding} of {len(result.claims)} reproduced ({verdicts}); {duration(elapsed)} so far"
