"""`paperworks tour`: the landmark claims of many papers in order, one table, and a report to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paperworks.cli.options import parse
from paperworks.cli.table import print_outcomes
from paperworks.core.errors import CorruptFile
from paperworks.lab.environment import describe_environment
from paperworks.lab.paper import Claim, Paper
from paperworks.lab.progress import Board
from paperworks.lab.report import Section, write_report
from paperworks.lab.results import Design, find_result, reading_folders, recorded_seconds
from paperworks.lab.runner import default_device, run_claim
from paperworks.papers import index, load

LEAD = (
    "The landmark claims of the reading list, checked on this machine: what each paper says, what was measured here, "
    "and the control that has to come out worse."
)
SMOKE = "This was a smoke run: it shows that the claims run, its numbers mean nothing."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the landmark claims and write a report to look at."""

    out: Path = Path("out/tour.html")
    """Where to write the report."""
    scale: Literal["smoke", "small", "large"] = "small"
    """smoke: seconds, only to see that it runs; small: a few minutes on a laptop; large: a big GPU."""
    seed: int = 0
    """First seed of every claim."""
    seeds: int | None = None
    """Most seeds of a comparison (default: as each is designed); on one seed no behaviour is judged."""


def main(arguments: list[str]) -> int:
    """Run the tour; a Ctrl-C ends it with a report of what was done."""
    options = parse(Options, "tour", arguments)
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}; a comparison needs at least one seed")
    stops = _stops()
    sections: list[Section] = []
    try:
        _walk(stops, options, sections)
    except KeyboardInterrupt:
        if sections:
            _finish(sections, options)
        raise
    _finish(sections, options)
    return 1 if any(section.outcome.verdict == "error" for section in sections) else 0


def _stops() -> list[tuple[Paper, Claim]]:
    """The claims that are in the tour, in its order."""
    papers = [load(entry.key) for entry in index() if entry.tour]
    stops = [
        (claim.tour, paper.key, paper, claim) for paper in papers for claim in paper.claims if claim.tour is not None
    ]
    return [(paper, claim) for _, _, paper, claim in sorted(stops, key=lambda stop: stop[:2])]


def _walk(stops: list[tuple[Paper, Claim]], options: Options, sections: list[Section]) -> None:
    # A smoke claim takes about a second; the others what they took when they were last recorded.
    jobs = [
        (claim.statement, 1.0 if options.scale == "smoke" else _seconds(paper, claim, options.scale))
        for paper, claim in stops
    ]
    with Board(jobs, title="tour") as board:
        for number, (paper, claim) in enumerate(stops):
            board.begin(number)
            outcome, images = run_claim(
                paper, claim, options.scale, options.seed, board=board, most_seeds=options.seeds
            )
            board.end(number, outcome.verdict, outcome.seconds)
            sections.append(Section(paper=paper, outcome=outcome, images=images, earlier=_earlier(paper.key)))


def _seconds(paper: Paper, claim: Claim, scale: str) -> float | None:
    return recorded_seconds(reading_folders(), paper.key, scale).get(claim.name)


def _earlier(key: str) -> list[Design]:
    """Earlier designs of a paper's experiments, from its recorded result."""
    try:
        result = find_result(reading_folders(), key)
    except CorruptFile:  # `paperworks list` says what is wrong with it
        return []
    return result.earlier if result else []


def _finish(sections: list[Section], options: Options) -> None:
    print_outcomes([(section.paper.key, section.outcome) for section in sections])
    environment = describe_environment(default_device(options.scale))
    environment |= {"scale": options.scale, "seed": options.seed}
    lead = f"{LEAD} {SMOKE}" if options.scale == "smoke" else LEAD
    report = write_report(options.out, sections, title="The tour", lead=lead, environment=environment)
    print(f"Report: {report.resolve()}")
