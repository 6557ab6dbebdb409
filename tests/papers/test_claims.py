"""Every claim of every paper runs at the smoke scale; whether it holds is a matter of the larger scales."""

from pathlib import Path

import pytest

from paperworks import api, papers
from paperworks.lab import load_result, results_folder, run_claim
from paperworks.lab.runner import CLAIM_SECONDS, PAPER_SECONDS
from paperworks.testbeds.smollm2 import stand_in

CLAIMS = [
    pytest.param(paper, claim, id=f"{paper.key}-{claim.name}")
    for paper in (papers.load(entry.key) for entry in papers.index())
    for claim in paper.claims
]


NEED_THE_FILE = {"answers_and_equals_reference"}  # reads the weights from the file a second time, by itself


@pytest.mark.smoke
@pytest.mark.parametrize(("paper", "claim"), CLAIMS)
def test_a_claim_runs_and_returns_a_whole_verdict(paper, claim, monkeypatch):
    if claim.name not in NEED_THE_FILE:  # half a gigabyte of weights tells no more about the code than a small model
        load = api.load
        monkeypatch.setattr(
            api, "load", lambda name, **options: stand_in() if name == "smollm2" else load(name, **options)
        )
    outcome, images = run_claim(paper, claim, "smoke", device="cpu")
    assert outcome.verdict in ("ran", "not run"), outcome.note
    if outcome.verdict == "not run":
        pytest.skip(outcome.note)
    assert outcome.measured
    assert outcome.checks
    assert set(outcome.figures) == set(images)
    if claim.kind == "behaviour":
        assert outcome.control


@pytest.mark.parametrize(("paper", "claim"), CLAIMS)
def test_a_claim_says_where_in_the_paper_it_stands(paper, claim):
    assert claim.statement
    assert claim.paper
    assert claim.check.__doc__


RESULTS = [
    (entry, result)
    for entry in papers.index()
    if (result := load_result(results_folder(Path(__file__)), entry.key)) is not None
]
JUDGED = [  # over seeds; the others were judged on one seed, before there was a budget
    (entry, result)
    for entry, result in RESULTS
    if all(claim.seeds for claim in result.claims if claim.kind == "behaviour" and claim.verdict != "not run")
]


def key_of(value):
    return getattr(value, "key", "")


@pytest.mark.parametrize(("entry", "result"), RESULTS, ids=key_of)
def test_a_recorded_behaviour_holds_on_two_seeds_or_more(entry, result):
    for claim in result.claims:
        if claim.kind == "behaviour" and claim.verdict in ("holds", "partly"):
            assert len(claim.seeds) >= 2, claim.name


@pytest.mark.parametrize(("entry", "result"), JUDGED, ids=key_of)
def test_a_recorded_paper_keeps_to_its_budget_or_says_why_not(entry, result):
    if not entry.budget_exception:
        assert result.seconds <= PAPER_SECONDS
        assert all(claim.seconds <= CLAIM_SECONDS for claim in result.claims)
