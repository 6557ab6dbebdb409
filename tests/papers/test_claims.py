"""Every claim of every paper runs at the smoke scale; whether it holds is a matter of the larger scales."""

import pytest

from paperworks import api, papers
from paperworks.lab import run_claim
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
    assert outcome.verdict in ("holds", "partly", "does not hold", "not run"), outcome.note
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
