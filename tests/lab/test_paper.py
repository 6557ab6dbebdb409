import math

import numpy
import pytest
import torch

from paperworks.lab import Lab, Paper, Verdict
from tests.lab.laboratory import make_paper


def empty_paper():
    return Paper(key="k", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())


def test_a_behaviour_without_a_control_is_refused_where_it_is_defined():
    with pytest.raises(ValueError, match="needs control="):
        empty_paper().claim("it works", paper="Table 1")


def test_exact_and_parity_claims_need_no_control():
    paper = empty_paper()

    @paper.claim("equal", paper="Equation 1", kind="exact", tour=3)
    def equal(lab: Lab) -> Verdict:
        return lab.judge({"equal": True}, {})

    assert [(claim.name, claim.kind, claim.tour) for claim in paper.claims] == [("equal", "exact", 3)]
    assert equal(Lab()).status == "holds"  # the decorated function stays an ordinary function


def test_two_claims_of_one_name_are_refused():
    paper = make_paper()

    def works(lab: Lab) -> Verdict:
        raise AssertionError

    with pytest.raises(ValueError, match="already has a claim named 'works'"):
        paper.claim("again", paper="Table 2", kind="exact")(works)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="unknown kind of evidence 'behavior'; did you mean 'behaviour'"):
        empty_paper().claim("it works", paper="Table 1", kind="behavior", control="c")


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ({"main": True, "other": True}, "holds"),
        ({"main": True, "other": False}, "partly"),
        ({"main": False, "other": True}, "not reproduced"),
        ({"main": False, "other": False}, "not reproduced"),
        ({"main": numpy.bool_(True)}, "holds"),
        ({"main": torch.tensor(1.0) > 2}, "not reproduced"),
    ],
)
def test_the_first_check_is_the_main_effect(checks, status):
    assert Lab().judge(checks, {"x": 1}).status == status


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, [1.0, math.nan], torch.tensor([1.0, math.inf])])
def test_numbers_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"'accuracy.*finite numbers only"):
        Lab().judge({"yes": True}, {"accuracy": bad})
    with pytest.raises(ValueError, match=r"'accuracy.*finite numbers only"):
        Lab().judge({"yes": True}, {}, control={"accuracy": bad})


@pytest.mark.parametrize("bad", [None, {"nested": 1}, object(), 1j])
def test_values_json_cannot_hold_are_refused_by_name(bad):
    with pytest.raises(TypeError, match=r"'accuracy' is a"):
        Lab().judge({"yes": True}, {"accuracy": bad})


def test_numpy_and_torch_numbers_become_plain_ones():
    verdict = Lab().judge(
        {"yes": True}, {"a": numpy.float32(0.5), "b": torch.tensor(3), "c": (1, 2), "d": numpy.array([1.5])}
    )
    assert verdict.measured == {"a": 0.5, "b": 3, "c": [1, 2], "d": [1.5]}
    assert [type(value) for value in verdict.measured.values()] == [float, int, list, list]


def test_a_check_must_be_a_truth_and_there_must_be_one():
    with pytest.raises(TypeError, match=r"check 'accuracy' is 0\.9"):
        Lab().judge({"accuracy": 0.9}, {})
    with pytest.raises(ValueError, match="at least one check"):
        Lab().judge({}, {"x": 1})


def test_a_verdict_has_one_of_the_known_statuses():
    with pytest.raises(ValueError, match="unknown verdict 'hold'; did you mean 'holds'"):
        Verdict(status="hold")


def test_the_reach_of_a_claim_follows_its_kind_and_a_behaviour_is_small_by_default():
    paper = empty_paper()
    for name, options in {
        "small": {"control": "c"},
        "real": {"control": "c", "reach": "real"},
        "full": {"control": "c", "reach": "full"},
        "exact": {"kind": "exact"},
        "parity": {"kind": "parity"},
    }.items():

        def check(lab: Lab) -> Verdict:
            raise AssertionError

        check.__name__ = name
        paper.claim("it works", paper="Table 1", **options)(check)
    assert all(claim.reach == claim.name for claim in paper.claims)


def test_a_reach_that_the_kind_does_not_have_is_refused():
    with pytest.raises(ValueError, match="unknown reach of a behaviour 'reel'; did you mean 'real'"):
        empty_paper().claim("it works", paper="Table 1", control="c", reach="reel")
    with pytest.raises(ValueError, match="unknown reach of a behaviour 'exact'"):
        empty_paper().claim("it works", paper="Table 1", control="c", reach="exact")
    with pytest.raises(ValueError, match="kind 'exact' has reach 'exact', not 'real'"):
        empty_paper().claim("it works", paper="Table 1", kind="exact", reach="real")


def test_usage_has_at_most_fifteen_lines():
    def with_usage(lines):
        usage = "\n".join(["", *(f"x = {line}" for line in range(lines)), ""])
        return Paper(
            key="k", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=(), usage=usage
        )

    assert with_usage(15).usage
    with pytest.raises(ValueError, match="usage of paper 'k' has 16 lines; 15 at most"):
        with_usage(16)


def test_the_source_of_a_paper_is_the_file_that_states_its_claims():
    assert make_paper().source.name == "laboratory.py"
    with pytest.raises(ValueError, match="no claims yet"):
        _ = empty_paper().source
