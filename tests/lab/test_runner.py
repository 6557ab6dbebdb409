import json
import random

import numpy
import pytest
import torch

from paperworks.core.errors import CorruptFile
from paperworks.lab import Beats, Lab, Paper, Verdict, load_result, results_folder, run, runner
from paperworks.lab.fingerprint import fingerprint
from paperworks.lab.progress import Board, Clock, duration
from paperworks.lab.results import Design
from paperworks.lab.runner import Choices, run_claim
from tests.lab.laboratory import make_paper


def test_every_claim_is_recorded_whatever_became_of_the_others(tmp_path):
    result = run(make_paper(), "small", seed=4, out=tmp_path, quiet=True)
    assert {claim.name: claim.verdict for claim in result.claims} == {
        "works": "one seed",
        "breaks": "error",
        "lacks_its_file": "not run",
        "forgot_its_control": "error",
        "is_better": "holds",
    }
    notes = {claim.name: claim.note for claim in result.claims}
    assert notes["lacks_its_file"] == "weights.gguf is not here; put it into ~/weights"
    assert notes["breaks"].endswith("RuntimeError: the part fell off")
    assert "laboratory.py:" in notes["breaks"]
    assert "/" not in notes["breaks"]  # file names only: a result carries no path of the machine
    assert "measured no control" in notes["forgot_its_control"]
    assert (result.holding, len(result.claims)) == (1, 5)


def test_the_file_has_exactly_the_fields_of_the_plan_and_reads_back_equal(tmp_path):
    paper = make_paper()
    result = run(paper, "small", seed=4, out=tmp_path, quiet=True)
    document = json.loads((tmp_path / "sample.json").read_text())
    assert set(document) == {
        *("key", "scale", "seeds", "environment", "fingerprint", "claims", "earlier", "sources", "choices"),
    }
    assert set(document["claims"][0]) == {
        *("name", "kind", "statement", "paper", "measured", "control", "verdict", "seconds", "figures"),
        *("note", "checks", "texts", "tables", "reach", "seeds", "arms", "curves", "difference", "interval"),
    }
    assert document["seeds"] == [4, 5, 6, 7, 8]
    assert document["fingerprint"] == fingerprint(paper.source, paper.implements).code
    assert "laboratory.py" in document["sources"]
    compared = document["claims"][-1]
    assert compared["arms"]["with it"]["loss"] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    assert compared["interval"]["low"] <= -1.6 <= compared["interval"]["high"]
    assert document["claims"][0]["figures"] == ["sample-line.svg"]
    assert document["claims"][1]["control"] is None
    assert (tmp_path / "sample-line.svg").read_bytes() == result.images["sample-line.svg"]
    assert load_result(tmp_path, "sample").to_dict() == result.to_dict() == document


def test_large_results_stand_beside_the_small_ones(tmp_path):
    run(make_paper(), "small", out=tmp_path, quiet=True)
    run(make_paper(), "large", out=tmp_path, quiet=True, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("sample.json", "sample-line.svg", "sample.large.json", "sample.large-line.svg"),
    }
    assert load_result(tmp_path, "sample", "large").claims[0].measured["scale"] == "large"


def test_a_smoke_run_is_not_recorded_unless_it_is_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(make_paper(), "smoke", quiet=True)
    assert list(tmp_path.iterdir()) == []
    run(make_paper(), "smoke", out=tmp_path / "there", quiet=True)
    assert (tmp_path / "there" / "sample.smoke.json").is_file()


def test_results_lie_in_the_checkout_around_or_right_here(tmp_path):
    assert results_folder(tmp_path) == tmp_path.resolve() / "results"
    (tmp_path / "paperworks" / "papers").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    assert results_folder(tmp_path / "docs" / "deep") == tmp_path.resolve() / "results"


def test_only_some_claims_can_be_run_and_an_unknown_one_is_refused():
    result = run(make_paper(), "smoke", only=["works"], quiet=True)
    assert [claim.name for claim in result.claims] == ["works"]
    with pytest.raises(ValueError, match="unknown claim of 'sample' 'work'; did you mean 'works'"):
        run(make_paper(), "smoke", only=["work"], quiet=True)


def drawing_paper(check):
    paper = Paper(key="drawn", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())
    paper.claim("first", paper="p", kind="exact")(check)
    return paper


def test_every_claim_starts_from_the_seed_so_its_neighbours_do_not_matter():
    def draws(lab: Lab) -> Verdict:
        numbers = {"python": random.random(), "numpy": numpy.random.rand(), "torch": torch.rand(())}
        return lab.judge({"drawn": True}, numbers)

    paper = drawing_paper(draws)
    first = run(paper, "smoke", seed=1, quiet=True).claims[0].measured
    assert run(paper, "smoke", seed=1, quiet=True).claims[0].measured == first
    other = run(paper, "smoke", seed=2, quiet=True).claims[0].measured
    assert all(other[name] != first[name] for name in first)


def test_a_check_that_returns_no_verdict_is_an_error_of_that_claim():
    outcome = run(drawing_paper(lambda lab: True), "smoke", quiet=True).claims[0]
    assert outcome.verdict == "error"
    assert "return lab.compare(...) or lab.judge(...)" in outcome.note


def interrupted_paper(interrupt):
    paper = Paper(key="long", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())

    @paper.claim("quick", paper="p", kind="exact")
    def quick(lab: Lab) -> Verdict:
        return lab.judge({"yes": True}, {"interrupted": interrupt})

    @paper.claim("slow", paper="p", kind="exact")
    def slow(lab: Lab) -> Verdict:
        if interrupt:
            raise KeyboardInterrupt
        return lab.judge({"yes": True}, {"interrupted": interrupt})

    return paper


def test_an_interrupt_keeps_what_is_done_and_what_was_recorded_of_the_rest(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(interrupted_paper(True), out=tmp_path, quiet=True)
    assert [claim.name for claim in load_result(tmp_path, "long").claims] == ["quick"]

    run(interrupted_paper(False), out=tmp_path, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted_paper(True), out=tmp_path, quiet=True)
    kept = load_result(tmp_path, "long").claims
    assert [(claim.name, claim.measured["interrupted"]) for claim in kept] == [("quick", True), ("slow", False)]


def test_figures_that_are_no_longer_drawn_are_removed(tmp_path):
    paper = make_paper()
    run(paper, out=tmp_path, quiet=True)
    (tmp_path / "sample-other.svg").write_text("of somebody else")
    del paper.claims[0]
    run(paper, out=tmp_path, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"sample.json", "sample-other.svg"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": "sample", "claims": 3}', '{"claims": [{"x": 1}]}'])
def test_a_damaged_result_is_named_and_the_way_out_told(tmp_path, content):
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"sample\.json is not a paperworks result.*paperworks run sample"):
        load_result(tmp_path, "sample")


def test_one_claim_can_be_run_by_itself():
    paper = make_paper()
    outcome, images = run_claim(paper, paper.claims[0], "smoke")
    assert outcome.verdict == "ran"
    assert outcome.texts[0]["title"] == "Said <before>"
    assert list(images) == outcome.figures == ["sample.smoke-line.svg"]


def test_the_clock_counts_what_waits_and_learns_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("paperworks.lab.progress.time.monotonic", lambda: now[0])
    clock = Clock([9.0, 30.0, None])  # a claim never timed counts as 15 s
    assert clock.remaining() == pytest.approx(9 + 30 + 15)
    clock.begin(0)
    now[0] += 19.0
    clock.end()
    # Twice as slow as recorded, with one second added to either side: (19 + 1) / (9 + 1).
    assert clock.pace() == pytest.approx(2.0)
    assert clock.remaining() == pytest.approx(2 * 45)
    clock.begin(1)
    now[0] += 30.0
    assert clock.remaining() == pytest.approx(60 - 30 + 30)
    assert clock.fraction() == pytest.approx((9 + 15) / 54)
    now[0] += 300.0  # far over its estimate: nothing negative, and the bar waits below the end of this job
    assert clock.remaining() == pytest.approx(2 * 15)
    assert clock.fraction() < (9 + 30) / 54
    clock.end()
    assert clock.fraction() == pytest.approx(39 / 54)


def test_a_job_that_was_not_run_does_not_set_the_pace():
    clock = Clock([100.0, 10.0])
    clock.begin(0)
    clock.end(counts=False)
    assert clock.pace() == 1.0
    assert clock.remaining() == pytest.approx(10.0)


def test_the_board_writes_a_line_a_job_into_a_log_and_bars_on_a_terminal():
    import io

    from rich.console import Console

    log = io.StringIO()
    with Board([("first [x]", 1.0)], console=Console(file=log, width=120)) as board:
        board.begin(0)
        board.end(0, "holds", 1.25)
    assert "[1/1] holds" in log.getvalue()
    assert "first [x]" in log.getvalue()

    terminal = io.StringIO()
    with Board(
        [("first", 100.0)], title="tour", console=Console(file=terminal, force_terminal=True, width=120)
    ) as board:
        board.begin(0)
        assert list(Lab(board=board).track(range(3), "steps of work")) == [0, 1, 2]
        board.refresh()
    assert "tour 1/1" in terminal.getvalue()
    assert "1:40 left" in terminal.getvalue()


def test_durations_are_written_as_people_say_them():
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 65, 600)] == ["0 s", "59 s", "1:00", "1:05", "10:00"]


def behaviour(status, seeds=0):
    """A paper with one behaviour, judged by `judge` or over seeds by `compare`."""
    paper = Paper(key="one", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())

    @paper.claim("it works", paper="p", control="c")
    def works(lab: Lab) -> Verdict:
        if seeds:
            return lab.compare(
                arms={"a": lambda seed: {"x": 1.0}, "b": lambda seed: {"x": 0.0}},
                main=Beats("a", "b", on="x", by=0.5),
                seeds=seeds,
            )
        return lab.judge({"main": status != "not reproduced", "other": status != "partly"}, {"x": 1}, control={"x": 0})

    return paper


@pytest.mark.parametrize(
    ("judged", "recorded"), [("holds", "one seed"), ("partly", "one seed"), ("not reproduced", "not reproduced")]
)
def test_a_behaviour_judged_on_one_seed_can_never_hold(judged, recorded):
    paper = behaviour(judged)
    assert run_claim(paper, paper.claims[0])[0].verdict == recorded


def test_a_comparison_on_one_seed_can_never_hold():
    for seeds, verdict in ((1, "one seed"), (2, "holds")):
        paper = behaviour("holds", seeds)
        assert run_claim(paper, paper.claims[0])[0].verdict == verdict
    paper = behaviour("holds", 3)
    assert run_claim(paper, paper.claims[0], most_seeds=1)[0].verdict == "one seed"


def test_a_smoke_run_is_ran_whatever_its_checks():
    for paper in (behaviour("not reproduced"), behaviour("holds", 3)):
        assert run_claim(paper, paper.claims[0], "smoke")[0].verdict == "ran"


def test_a_result_of_other_code_is_remembered_with_its_verdicts(tmp_path, monkeypatch):
    def run_as(code):
        def of(*given):
            found = fingerprint(*given)
            return type(found)(code=code, sources=found.sources, files=found.files)

        monkeypatch.setattr(runner, "fingerprint", of)
        return run(make_paper(), "small", out=tmp_path, quiet=True)

    first = run_as("a" * 64)
    assert (first.earlier, first.design_number) == ([], 1)
    assert run_as("a" * 64).earlier == []  # the same design again
    second = run_as("b" * 64)
    assert second.design_number == 2
    (design,) = second.earlier
    assert design == Design(
        hash="a" * 64,
        scale="small",
        seeds=[0, 1, 2, 3, 4],
        verdicts={claim.name: claim.verdict for claim in first.claims},
        date=first.environment["date"],
    )
    third = run_as("c" * 64)
    assert [design.hash[0] for design in third.earlier] == ["a", "b"]
    assert third.design_number == 3
    assert load_result(tmp_path, "sample").to_dict() == third.to_dict()
    # A return to an earlier design is no new one, and nothing is forgotten.
    back = run_as("a" * 64)
    assert [design.hash[0] for design in back.earlier] == ["a", "b", "c"]
    assert back.design_number == 3


def test_a_damaged_result_is_not_replaced_since_its_history_would_be_lost(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text('{"key": "sample"}')
    with pytest.raises(CorruptFile, match=r"sample\.json is not a paperworks result .* restore it"):
        run(make_paper(), "small", out=tmp_path, quiet=True)
    assert path.read_text() == '{"key": "sample"}'


def test_a_design_run_takes_seeds_from_100_and_records_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(behaviour("holds", 3), design=True, quiet=True)
    assert result.seeds == [100, 101, 102]
    assert result.claims[0].seeds == [100, 101, 102]
    assert list(tmp_path.iterdir()) == []


def test_another_first_seed_is_written_beside_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(behaviour("holds", 2), seed=7, quiet=True)
    assert (tmp_path / "out" / "one.json").is_file()
    assert not (tmp_path / "results").exists()


def speaking_paper():
    paper = Paper(key="lm", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())

    @paper.claim("it speaks", paper="p", kind="exact")
    def speaks(lab: Lab) -> Verdict:
        return lab.judge({"yes": True}, {"model": lab.model_name("smollm2")})

    @paper.claim("it counts", paper="p", kind="exact")
    def counts(lab: Lab) -> Verdict:
        return lab.judge({"yes": True}, {"one": 1})

    return paper


def test_a_run_on_the_users_model_is_written_beside_the_results_with_the_claims_that_use_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(speaking_paper(), choices=Choices(model="org/mine"), quiet=True)
    assert [(claim.name, claim.measured["model"]) for claim in result.claims] == [("speaks", "org/mine")]
    assert json.loads((tmp_path / "out" / "lm.json").read_text())["choices"] == {"model": "org/mine"}
    assert not (tmp_path / "results").exists()
    with pytest.raises(ValueError, match="holds the results of the papers' own experiments"):
        run(speaking_paper(), choices=Choices(model="org/mine"), out=tmp_path / "results", quiet=True)


def test_a_choice_that_no_claim_can_use_is_refused_before_anything_runs(tmp_path):
    paper = make_paper()  # stands in a file in which no claim speaks of a model
    with pytest.raises(ValueError, match="no claim of sample speaks of a language model"):
        run(paper, choices=Choices(model="smollm2"), quiet=True)
    data = tmp_path / "a.txt"
    with pytest.raises(ValueError, match="there is no such file"):
        run(paper, choices=Choices(data=data), quiet=True)
    data.touch()
    with pytest.raises(ValueError, match="no claim of sample speaks of a data file"):
        run(paper, choices=Choices(data=data), quiet=True)


def test_a_claim_over_its_budget_is_warned_of_unless_the_paper_says_why(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("paperworks.lab.stopwatch.now", lambda: (now[0], now[0]))

    def run_for(seconds, **options):
        paper = Paper(
            key="slow", title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=(), **options
        )

        @paper.claim("it lasts", paper="p", kind="exact")
        def lasts(lab: Lab) -> Verdict:
            now[0] += seconds
            return lab.judge({"yes": True}, {"one": 1})

        run(paper, record=False)
        return capsys.readouterr().err

    assert "claim lasts took 3:01, over the budget of 3:00" in run_for(181)
    assert "paper slow took 6:01" in run_for(361)
    assert "budget" not in run_for(179)
    assert "budget" not in run_for(400, budget_exception="the effect needs a large table")


def test_two_claims_cannot_draw_figures_of_one_name():
    paper = Paper(key="two", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=())
    for name in ("first", "second"):

        def draws(lab: Lab) -> Verdict:
            with lab.figure("line") as figure:
                figure.subplots().plot([0, 1], [0, 1])
            return lab.judge({"yes": True}, {"one": 1})

        draws.__name__ = name
        paper.claim("it draws", paper="p", kind="exact")(draws)
    first, second = run(paper, "small", record=False, quiet=True).claims
    assert (first.verdict, second.verdict) == ("holds", "error")
    assert "already has a figure named 'line'" in second.note
