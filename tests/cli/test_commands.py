import json
import re
import subprocess
import sys

import pytest

from paperworks import papers
from paperworks.cli import main as cli
from paperworks.lab import Lab, Paper, Verdict, run
from paperworks.lab.results import results_folder


def call(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder outside any checkout, where nothing was ever run, with a package that brings no results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paperworks.lab.fingerprint.PACKAGE", tmp_path / "nowhere" / "paperworks")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lsit"], "unknown command 'lsit'; did you mean 'list'"),
        (["show", "groking"], "unknown paper 'groking'; did you mean 'grokking'"),
        (["run", "groking"], "unknown paper 'groking'"),
        (["run"], "say which papers to run"),
        (["list", "--family", "trainnig"], "unknown family 'trainnig'; did you mean 'training'"),
        (["list", "--status", "hold"], "unknown status 'hold'; did you mean 'holds'"),
        (["list", "--year", "soon"], "--year 'soon' is neither a year nor two"),
        (["show", "2999.99999"], "no paper of the reading list refers to arXiv:2999.99999"),
        (["run", "grokking", "--design", "--out", "there"], "records nothing"),
        (["run", "grokking", "--model", "smollm2"], "no claim of grokking speaks of a language model"),
        (["refresh", "groking"], "unknown paper 'groking'"),
        (["refresh", "--minutes", "0"], "give a time above 0"),
        (["tour", "--seeds", "0"], "at least one seed"),
        (["run", "grokking", "--scale", "huge"], "huge"),
        (["list", "--colour"], "--colour"),
        (["tour", "--scale", "tiny"], "tiny"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_exit_code_2_and_no_traceback(capsys, elsewhere, arguments, message):
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_help_of_the_command_and_of_every_subcommand(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in cli.COMMANDS:
        assert f"  {command} " in out
        assert call(capsys, command, "--help")[0] == 0
    assert call(capsys)[0] == 2  # no command is a mistake, answered with the help


def rows_of(capsys, *arguments):
    return json.loads(call(capsys, "list", "--json", *arguments)[1])


def test_list_shows_every_paper_and_what_became_of_it(capsys, elsewhere):
    code, out, _ = call(capsys, "list")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]  # not a terminal: a line a paper, columns by tabs
    assert [line[1] for line in lines] == [entry.key for entry in papers.index()]
    assert {line[4] for line in lines} == {"never run"}
    assert {len(line) for line in lines} == {7}


def test_list_can_be_filtered(capsys, elsewhere):
    rows = rows_of(capsys, "--family", papers.find("grokking").family)
    assert {row["family"] for row in rows} == {papers.find("grokking").family}
    assert {verdict for row in rows for verdict in row["verdicts"].values()} == {"never run"}
    assert rows_of(capsys, "--status", "holds") == []
    assert {row["year"] for row in rows_of(capsys, "--year", "2021")} == {2021}
    assert {row["year"] for row in rows_of(capsys, "--year", "2019-2021")} == {2019, 2020, 2021}


@pytest.mark.parametrize("word", ["LOW-RANK adapt", "hu, ", "2106.09685", "lora"])
def test_list_searches_title_authors_key_and_reference(capsys, elsewhere, word):
    found = [row["key"] for row in rows_of(capsys, "--search", word)]
    assert "lora" in found
    assert len(found) < len(papers.index())


def terminal(monkeypatch, capsys, width, *arguments):
    """What `list` writes to a terminal, without colours; links as they are written."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = call(capsys, "list", *arguments)[1]
    return re.sub(r"\x1b\[[0-9;]*m", "", out)


def without_links(text):
    return re.sub(r"\x1b\]8;[^\x1b]*\x1b\\", "", text)


def test_list_on_a_terminal_has_a_line_of_at_most_80_columns_for_each_paper(capsys, elsewhere, monkeypatch):
    for entry in papers.index():
        record(entry.key, results_folder(), lone=9)
    out = terminal(monkeypatch, capsys, 80)
    lines = without_links(out).splitlines()
    tally = lines.index("")
    assert max(map(len, lines[:tally])) <= 80
    keys = [line.split()[0] for line in lines[:tally] if line.startswith("  ")]
    assert keys == [entry.key for entry in papers.index()]
    families = [line for line in lines[:tally] if not line.startswith(" ")]
    assert families == sorted({entry.family for entry in papers.index()})
    assert f"{len(keys)} papers, {len(keys)} stale" in lines[tally + 1]
    assert "https://arxiv.org/abs/2106.09685" in out  # a link of the terminal
    wide = without_links(terminal(monkeypatch, capsys, 140))
    assert papers.find("lora").title in wide


def record(key, folder, passed=True, seed=0, lone=0):
    """Record a result of a real key from a tiny paper; `lone` behaviours of the real paper rest on one seed."""
    paper = Paper(key=key, title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=())
    names = [claim.name for claim in papers.find(key).claims]
    for number, name in enumerate(names):

        def check(lab: Lab) -> Verdict:
            return lab.judge({"yes": passed}, {"answer": 7}, control={"answer": 6})

        check.__name__ = name
        kind = "behaviour" if number < lone else "exact"
        paper.claim(f"claim {name}", paper="p", kind=kind, control="c")(check)
    return run(paper, seed=seed, out=folder, quiet=True)


def test_list_counts_what_is_reproduced_and_marks_what_is_stale_or_on_one_seed(capsys, elsewhere):
    record("grokking", results_folder(), lone=1)
    line = next(line for line in call(capsys, "list")[1].splitlines() if "\tgrokking\t" in line)
    assert line.split("\t")[4:] == ["3 of 4 reproduced", "small", "stale, 1 on one seed"]
    assert [row["key"] for row in rows_of(capsys, "--stale")] == ["grokking"]
    assert [row["key"] for row in rows_of(capsys, "--status", "one seed")] == ["grokking"]

    path = results_folder() / "grokking.json"
    document = json.loads(path.read_text())
    document["fingerprint"] = papers.find("grokking").fingerprint
    path.write_text(json.dumps(document))
    (row,) = rows_of(capsys, "--search", "grokking", "--status", "holds")
    assert (row["reproduced"], row["stale"], row["reach"]) == (3, False, "small")
    assert rows_of(capsys, "--stale") == []


def test_a_damaged_result_is_one_line_in_list_and_show(capsys, elsewhere):
    results_folder().mkdir()
    (results_folder() / "grokking.json").write_text("{")
    code, out, err = call(capsys, "list")
    assert code == 0
    assert "\tgrokking\t2022\t" in out
    assert "damaged file" in next(line for line in out.splitlines() if "\tgrokking\t" in line)
    assert err.count("grokking.json is not a paperworks result") == 1
    assert [row["key"] for row in rows_of(capsys, "--status", "damaged")] == ["grokking"]
    code, out, err = call(capsys, "show", "grokking")
    assert code == 0
    assert "grokking.json is not a paperworks result" in " ".join(out.split())
    assert "Traceback" not in out + err


def test_show_tells_summary_parts_and_claims_with_their_last_results(capsys, elsewhere):
    code, out, _ = call(capsys, "show", "grokking")
    assert code == 0
    paper = papers.load("grokking")
    joined = " ".join(out.split())
    assert paper.title in joined
    assert paper.implements[0] in out
    for claim in paper.claims:
        assert claim.statement in joined
        assert f"({claim.reach})" in joined
    assert "never run" in out
    assert "operation_table" in out.partition("Usage")[2]


def test_show_takes_an_arxiv_number_and_shows_all_papers_that_share_it(capsys, elsewhere):
    for name in ("2106.09685", "arXiv:2106.09685", "https://arxiv.org/abs/2106.09685"):
        assert papers.find("lora").title in call(capsys, "show", name)[1]
    out = " ".join(call(capsys, "show", "2305.14314")[1].split())
    for key in ("qlora", "nf4"):
        assert papers.find(key).summary[:40] in out


def test_show_counts_the_designs_and_lists_the_earlier_ones(capsys, elsewhere):
    record("grokking", results_folder())
    path = results_folder() / "grokking.json"
    document = json.loads(path.read_text())
    old = {"scale": "small", "seeds": [0], "verdicts": {"generalises_late": "holds"}, "date": "2026-01-02 10:00 UTC"}
    document["earlier"] = [{**old, "hash": "a" * 64}, {**old, "hash": "b" * 64, "seeds": [0, 1]}]
    path.write_text(json.dumps(document))
    out = " ".join(call(capsys, "show", "grokking")[1].split())
    assert "third design" in out
    assert "first: 1 holds (seed 0, 2026-01-02, aaaaaaaa)" in out
    assert "second: 1 holds (seeds 0, 1, 2026-01-02, bbbbbbbb)" in out
    assert "The code has changed since" in out


def test_results_that_came_with_the_package_are_shown_outside_of_a_checkout(capsys, elsewhere, monkeypatch):
    package = elsewhere / "site" / "paperworks"
    record("grokking", package / "_results")
    monkeypatch.setattr("paperworks.lab.fingerprint.PACKAGE", package)
    (row,) = rows_of(capsys, "--search", "grokking: gen")
    assert row["reproduced"] == 4
    record("grokking", results_folder(), passed=False)  # a run of one's own comes first
    (row,) = rows_of(capsys, "--search", "grokking: gen")
    assert row["reproduced"] == 0


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "grokking"], *([command, "--help"] for command in cli.COMMANDS)],
    ids=" ".join,
)
def test_looking_imports_little_and_no_torch(arguments):
    script = (
        "import sys, time; before = set(sys.modules)\n"
        "from paperworks.cli.main import main\n"
        f"code = main({arguments})\n"
        "print(code, time.process_time(), *set(sys.modules) - before, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, seconds, *imported = done.stderr.splitlines()[-1].split()
    assert code == "0"
    assert not {"torch", "numpy", "matplotlib", "transformers"} & {*imported}
    # The bar of the house is half a second on a quiet machine; a count is the same on a busy one.
    assert float(seconds) < 2.0
    assert len(imported) < 420


def test_importing_paperworks_as_a_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "paperworks", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("paperworks ")


def test_list_into_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m paperworks list --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_an_interrupt_is_exit_code_130(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("paperworks.cli.reading_list.main", interrupted)
    code, _, err = call(capsys, "list")
    assert code == 130
    assert "Traceback" not in err


def test_debugging_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("PAPERWORKS_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown paper"):
        cli.main(["show", "groking"])
