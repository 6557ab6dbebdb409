import json
from pathlib import Path

import pytest

from paperworks.cli import main as cli
from paperworks.cli import run as run_command
from paperworks.cli import tour
from paperworks.core.errors import AssetUnavailable
from paperworks.lab import Lab, Paper, Verdict
from paperworks.papers import Entry, Statement


def entry(key):
    return Entry(
        key=key,
        title="t",
        authors="a",
        year=1,
        ref="r",
        family="f",
        summary="s",
        implements=(),
        module="m",
        file=Path(__file__),
        claims=(Statement(name="n", statement="s", paper="p", tour=1),),
    )


def make_papers(interrupt=False):
    """Two papers whose claims interleave in the tour."""
    first, second = (
        Paper(key=key, title=key, authors="a", year=1, ref="r", family="f", summary="s", implements=())
        for key in ("first", "second")
    )

    @second.claim("comes second", paper="Table 2", kind="exact", tour=20)
    def middle(lab: Lab) -> Verdict:
        if interrupt:
            raise KeyboardInterrupt
        raise AssetUnavailable("model.gguf is not here; set PAPERWORKS_MODEL to its path.")

    @first.claim("comes third", paper="Table 3", kind="exact", tour=30)
    def last(lab: Lab) -> Verdict:
        with lab.figure("dots") as figure:
            figure.subplots().plot([1, 2], [3, 4])
        return lab.judge({"yes": True}, {"answer": 42})

    @first.claim("comes first", paper="Table 1", control="c", reach="real", tour=10)
    def start(lab: Lab) -> Verdict:
        return lab.judge({"yes": True}, {"answer": 41}, control={"answer": 0})

    @first.claim("stays at home", paper="Table 4", kind="exact")
    def home(lab: Lab) -> Verdict:
        raise AssertionError

    return {"first": first, "second": second}


@pytest.fixture
def tour_papers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    papers = make_papers()
    monkeypatch.setattr(tour, "index", lambda: [entry(key) for key in papers])
    monkeypatch.setattr(tour, "load", lambda key: papers[key])
    return papers


def test_the_tour_goes_through_the_papers_in_order_and_ends_with_a_report(tour_papers, tmp_path, capsys):
    assert cli.main(["tour", "--scale", "smoke"]) == 0
    out = capsys.readouterr().out
    assert out.index("comes first") < out.index("comes second") < out.index("comes third")
    assert "stays at home" not in out
    assert out.count("model.gguf is not here; set PAPERWORKS_MODEL to its path.") == 1
    report = tmp_path / "out" / "tour.html"
    assert str(report) in out
    page = report.read_text(encoding="utf-8")
    assert "<svg" in page
    assert "model.gguf is not here" in page
    assert not (tmp_path / "results").exists()  # the record is what `run` measures


def test_an_interrupted_tour_reports_what_was_done(tour_papers, monkeypatch, tmp_path, capsys):
    papers = make_papers(interrupt=True)
    monkeypatch.setattr(tour, "load", lambda key: papers[key])
    assert cli.main(["tour", "--scale", "smoke", "--out", "here.html"]) == 130
    page = (tmp_path / "here.html").read_text(encoding="utf-8")
    assert "comes first" in page
    assert "comes third" not in page


def test_run_records_prints_and_tells_an_error_by_its_exit_code(tour_papers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_command, "lookup", lambda key: [entry(key)])
    monkeypatch.setattr(run_command, "load", lambda key: tour_papers[key])
    assert cli.main(["run", "second"]) == 0
    assert "not run" in capsys.readouterr().out
    assert json.loads((tmp_path / "results" / "second.json").read_text())["claims"][0]["verdict"] == "not run"

    assert cli.main(["run", "first", "--out", "there", "--json"]) == 1  # one of its claims raises
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "there" / "first.json").read_text())
    assert [claim["verdict"] for claim in document["claims"]] == ["holds", "one seed", "error"]


def test_a_smoke_run_says_that_it_is_not_recorded(tour_papers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_command, "lookup", lambda key: [entry(key)])
    monkeypatch.setattr(run_command, "load", lambda key: tour_papers[key])
    assert cli.main(["run", "second", "--scale", "smoke"]) == 0
    assert "not recorded" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_run_shows_one_seed_only_and_how_far_the_evidence_reaches(tour_papers, monkeypatch, capsys):
    monkeypatch.setattr(run_command, "lookup", lambda key: [entry(key)])
    monkeypatch.setattr(run_command, "load", lambda key: tour_papers[key])
    cli.main(["run", "first"])
    out = capsys.readouterr().out
    assert "one seed only" in out
    assert "real" in out


def test_a_design_run_and_one_of_a_users_own_are_not_among_the_results(tour_papers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_command, "lookup", lambda key: [entry(key)])
    monkeypatch.setattr(run_command, "load", lambda key: tour_papers[key])
    cli.main(["run", "first", "--design"])
    assert "is not recorded" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    cli.main(["run", "first", "--seed", "3"])
    assert str(Path("out") / "first.json") in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
