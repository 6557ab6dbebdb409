import json
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
    """A folder outside any checkout, where nothing was ever run."""
    monkeypatch.chdir(tmp_path)
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


def test_list_shows_every_paper_and_what_became_of_it(capsys, elsewhere):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for entry in papers.index():
        assert entry.key in out
    assert "never run" in out


def test_list_as_json_can_be_filtered(capsys, elsewhere):
    rows = json.loads(call(capsys, "list", "--json", "--family", "training")[1])
    assert {row["family"] for row in rows} == {"training"}
    assert {row["status"] for row in rows} == {"never run"}
    assert json.loads(call(capsys, "list", "--json", "--status", "holds")[1]) == []


def record(key, folder, passed=True, seed=0):
    """Record a result of a real key from a tiny paper."""
    paper = Paper(key=key, title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=())

    @paper.claim("quick", paper="p", kind="exact")
    def quick(lab: Lab) -> Verdict:
        return lab.judge({"yes": passed}, {"answer": 7})

    return run(paper, seed=seed, out=folder, quiet=True)


def test_list_tells_the_recorded_status_and_marks_a_result_of_another_text_as_stale(capsys, elsewhere):
    record("grokking", results_folder(), passed=False)
    row = next(row for row in json.loads(call(capsys, "list", "--json")[1]) if row["key"] == "grokking")
    assert (row["status"], row["stale"]) == ("does not hold", True)
    assert "grokking" in call(capsys, "list", "--status", "stale")[1]

    path = results_folder() / "grokking.json"
    document = json.loads(path.read_text())
    document["source_hash"] = papers.find("grokking").source_hash
    path.write_text(json.dumps(document))
    row = next(row for row in json.loads(call(capsys, "list", "--json")[1]) if row["key"] == "grokking")
    assert (row["status"], row["stale"]) == ("does not hold", False)


def test_list_survives_a_damaged_result(capsys, elsewhere):
    results_folder().mkdir()
    (results_folder() / "grokking.json").write_text("{")
    row = next(row for row in json.loads(call(capsys, "list", "--json")[1]) if row["key"] == "grokking")
    assert row["status"] == "error"


def test_show_tells_summary_parts_and_claims_with_their_last_results(capsys, elsewhere):
    code, out, _ = call(capsys, "show", "grokking")
    assert code == 0
    paper = papers.load("grokking")
    joined = " ".join(out.split())
    assert paper.title in joined
    assert paper.implements[0] in out
    for claim in paper.claims:
        assert claim.statement in joined
    assert "never run" in out


def test_list_imports_little_and_no_torch():
    script = (
        "import sys; before = set(sys.modules)\n"
        "from paperworks.cli.main import main\n"
        "code = main(['list'])\n"
        "print(code, *set(sys.modules) - before, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, *imported = done.stderr.splitlines()[-1].split()
    assert code == "0"
    assert not {"torch", "numpy", "matplotlib", "transformers"} & {*imported}
    # the bar of the plan is half a second; 166 modules take 0.17 s, and a count is the same on a busy machine
    assert len(imported) < 300


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
