"""Every claim of every paper runs at the smoke scale; whether it holds is a matter of the larger scales."""

import pytest

from paperworks import papers
from paperworks.lab import run_claim

CLAIMS = [
    pytest.param(paper, claim, id=f"{paper.key}-{claim.name}")
    for paper in (papers.load(entry.key) for entry in papers.index())
    for claim in paper.claims
]


@pytest.mark.smoke
@pytest.mark.parametrize(("paper", "claim"), CLAIMS)
def test_a_claim_runs_and_returns_a_whole_verdict(paper, claim):
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
