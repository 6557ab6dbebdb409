import json
from pathlib import Path

import pytest

from paperworks.cli import main as cli
from paperworks.cli import refresh
from paperworks.lab import Lab, Paper, Verdict, load_result, run
from paperworks.lab import runner as runner_module
from paperworks.papers import Entry, Statement


def make_paper(key, ran, interrupt=False):
    paper = Paper(key=key, title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=())

    @paper.claim("it is exact", paper="p", kind="exact")
    def quick(lab: Lab) -> Verdict:
        if interrupt:
            raise KeyboardInterrupt
        ran.append(key)
        return lab.judge({"yes": True}, {"one": 1})

    return paper


def make_entry(key, family="f"):
    return Entry(
        key=key,
        title="t",
        authors="a",
        year=1,
        ref="r",
        family=family,
        summary="s",
        implements=(),
        module="m",
        file=Path(__file__),
        claims=(Statement(name="quick", statement="it is exact", paper="p", kind="exact"),),
    )


@pytest.fixture
def list_of_three(tmp_path, monkeypatch):
    """Papers "dear" (stale, 300 s), "cheap" (stale, 2 s) and "fresh", "new" never run; returns the keys as they run."""
    monkeypatch.chdir(tmp_path)
    ran = []
    entries = {key: make_entry(key, "g" if key == "new" else "f") for key in ("dear", "cheap", "fresh", "new")}
    monkeypatch.setattr(refresh, "index", lambda: list(entries.values()))
    monkeypatch.setattr(refresh, "lookup", lambda name: [entries[name]])
    monkeypatch.setattr(refresh, "load", lambda key: make_paper(key, ran))
    for key, seconds, code in (("dear", 300.0, "a"), ("cheap", 2.0, "a"), ("fresh", 1.0, None)):
        run(make_paper(key, []), out=tmp_path / "results", quiet=True)
        path = tmp_path / "results" / f"{key}.json"
        document = json.loads(path.read_text())
        document["claims"][0]["seconds"] = seconds
        document["fingerprint"] = code or document["fingerprint"]
        path.write_text(json.dumps(document))
    return ran


def test_refresh_runs_what_is_stale_or_was_never_run_the_cheapest_first(list_of_three, tmp_path, capsys):
    assert cli.main(["refresh", "--minutes", "30"]) == 0
    assert list_of_three == ["cheap", "dear", "new"]
    out = capsys.readouterr().out
    assert "cheap: 1 of 1 reproduced (quick holds)" in out
    assert "3 papers run" in out
    assert load_result(tmp_path / "results", "cheap").earlier[0].hash == "a"
    assert cli.main(["refresh"]) == 0
    assert "All 4 papers are up to date" in capsys.readouterr().out
    assert list_of_three == ["cheap", "dear", "new"]


def test_refresh_starts_nothing_that_is_not_expected_to_end_in_time(list_of_three, capsys):
    assert cli.main(["refresh", "--minutes", "1"]) == 0
    assert list_of_three == ["cheap"]
    out = capsys.readouterr().out
    assert "2 papers do not fit" in out
    assert "next is dear (stale, about 5:00)" in out
    assert "1 papers run" in out


def test_refresh_can_be_limited_to_papers_or_a_family_and_only_planned(list_of_three, capsys):
    cli.main(["refresh", "--family", "g", "--dry-run"])
    assert capsys.readouterr().out == "new (never run, unknown time)\n"
    cli.main(["refresh", "dear", "fresh", "--dry-run"])
    assert capsys.readouterr().out == "dear (stale, about 5:00)\n"
    assert list_of_three == []


def test_an_interrupt_keeps_and_reports_what_is_done(list_of_three, monkeypatch, tmp_path, capsys):
    load = refresh.load
    monkeypatch.setattr(refresh, "load", lambda key: make_paper(key, [], key == "dear") if key == "dear" else load(key))
    assert cli.main(["refresh", "--minutes", "30"]) == 130
    assert list_of_three == ["cheap"]
    assert "1 papers run" in capsys.readouterr().out
    assert load_result(tmp_path / "results", "cheap").claims[0].seconds < 2.0
    assert load_result(tmp_path / "results", "dear").fingerprint == "a"


def test_a_damaged_result_is_left_and_named(list_of_three, tmp_path, capsys):
    (tmp_path / "results" / "cheap.json").write_text("{")
    cli.main(["refresh", "--minutes", "30"])
    assert "cheap" not in list_of_three
    assert "cheap.json is not a paperworks result" in capsys.readouterr().out


def test_a_file_that_moved_is_recorded_again_without_a_run(list_of_three, tmp_path):
    path = tmp_path / "results" / "fresh.json"
    document = json.loads(path.read_text())
    sources = document["sources"]
    document["sources"] = {f"elsewhere{number}.py": source for number, source in enumerate(sources.values())}
    path.write_text(json.dumps(document))
    cli.main(["refresh", "fresh"])
    assert list_of_three == []
    assert json.loads(path.read_text())["sources"] == sources
    assert json.loads(path.read_text())["earlier"] == []


def test_refresh_on_a_cluster_records_what_comes_back(list_of_three, monkeypatch, tmp_path):
    addresses = []

    def completed(function, items, address, *, cpus):
        addresses.append(address)
        for item in items:
            yield item, function(item)

    monkeypatch.setattr(refresh.cluster, "completed", completed)
    recorded = runner_module.save_result
    monkeypatch.setattr(runner_module, "save_result", lambda *given: pytest.fail("a worker wrote a result"))
    assert cli.main(["refresh", "--minutes", "30", "--ray", "auto"]) == 0
    monkeypatch.setattr(runner_module, "save_result", recorded)
    assert addresses == ["auto"]
    assert list_of_three == ["cheap", "dear", "new"]
    assert load_result(tmp_path / "results", "dear").earlier[0].hash == "a"
