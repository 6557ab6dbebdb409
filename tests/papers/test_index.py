import ast
import importlib
import time
from pathlib import Path

import pytest

from paperworks import papers
from paperworks.lab.results import source_hash

ENTRIES = papers.index()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_the_index_says_what_the_imported_module_says(entry):
    paper = papers.load(entry.key)
    for name in ("key", "title", "authors", "year", "ref", "family", "summary", "implements"):
        assert getattr(entry, name) == getattr(paper, name)
    assert entry.claims == len(paper.claims)
    assert entry.tour == tuple(claim.tour for claim in paper.claims if claim.tour is not None)
    assert entry.source_hash == source_hash(paper.source)
    assert entry.module.split(".")[-2] == entry.family


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_every_part_a_paper_names_exists(entry):
    assert entry.implements
    for part in entry.implements:
        module, _, name = part.rpartition(".")
        assert hasattr(importlib.import_module(module), name), part


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown paper 'groking'; did you mean 'grokking'"):
        papers.load("groking")


TEXT = '''"""A paper."""
from paperworks.lab import Lab, Paper, Verdict

paper = Paper(
    key="key-{number}",
    title="A title (with brackets)",
    authors="A, B",
    year=2020,
    ref="arXiv:0000.00000",
    family="family",
    summary=(
        "Two sentences. "
        "Here (they) are."
    ),
    implements=("a.b",),
)


@paper.claim("one", paper="Table 1", control="c", tour=4)
def one(lab: Lab) -> Verdict:
    """Check."""


@paper.claim(
    "two",
    paper="Table 2",
    kind="exact",
    tour=12,
)
def two(lab: Lab) -> Verdict:
    """Check."""


@paper.claim("three", paper="Table 3, tour=7", kind="exact")
def three(lab: Lab) -> Verdict:
    """Check."""
'''


def write(folder: Path, text: str, name: str = "a.py") -> Path:
    (folder / "family").mkdir(exist_ok=True)
    (folder / "family" / "__init__.py").touch()
    (folder / "family" / name).write_text(text, encoding="utf-8")
    return folder


def test_claims_and_their_places_in_the_tour_are_read_from_the_text(tmp_path):
    (entry,) = papers.index(write(tmp_path, TEXT.replace("{number}", "1")))
    assert (entry.key, entry.claims, entry.tour) == ("key-1", 3, (4, 12))
    assert entry.summary == "Two sentences. Here (they) are."


def test_a_paper_may_stand_on_one_line(tmp_path):
    line = 'paper = Paper(key="k", title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=())\n'
    (entry,) = papers.index(write(tmp_path, line + "\nrest = (\n    1\n)\n"))
    assert (entry.key, entry.claims) == ("k", 0)


def test_three_hundred_papers_are_read_in_a_fraction_of_the_time_list_may_take(tmp_path):
    padding = "\n\ndef work() -> None:\n    " + "\n    ".join(f"x{i} = {i}" for i in range(200)) + "\n"
    for number in range(335):
        write(tmp_path, TEXT.replace("{number}", str(number)) + padding, f"m{number}.py")
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*/*.py")]

    def seconds(work):
        started = time.process_time()
        work()
        return time.process_time() - started

    ours, parsing = (
        min(seconds(work) for _ in range(2))
        for work in (lambda: papers.index(tmp_path), lambda: [ast.parse(text) for text in texts])
    )
    assert len(papers.index(tmp_path)) == 335
    # `paperworks list` may take 0.5 s, and parsing all of these files takes most of a second
    assert ours < parsing / 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no statement `paper = Paper"),
        ("paper = Paper(\n    key=make_key(),\n)\n", "must be literals"),
        ('paper = Paper("k")\n', "with keyword arguments"),
        ('paper = Paper(key="k")\n', "does not have the fields of a paper.*title"),
    ],
)
def test_a_file_that_is_not_a_paper_is_named_with_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"family.a.*{message}"):
        papers.index(write(tmp_path, text))


def test_two_papers_with_one_key_are_refused(tmp_path):
    write(tmp_path, TEXT)
    with pytest.raises(ValueError, match=r"family\.b and .*family\.a both have the key"):
        papers.index(write(tmp_path, TEXT, "b.py"))
