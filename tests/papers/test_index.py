import ast
import importlib
import time
from pathlib import Path

import pytest

from paperworks import papers
from paperworks.lab.fingerprint import fingerprint

ENTRIES = papers.index()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_the_index_says_what_the_imported_module_says(entry):
    paper = papers.load(entry.key)
    for name in (
        *("key", "title", "authors", "year", "ref", "family", "summary", "implements"),
        *("equation", "usage", "notes", "budget_exception"),
    ):
        assert getattr(entry, name) == getattr(paper, name)
    for written, claim in zip(entry.claims, paper.claims, strict=True):
        for name in ("name", "statement", "paper", "kind", "reach", "control", "tour"):
            assert getattr(written, name) == getattr(claim, name)
    assert entry.file == paper.source
    assert entry.fingerprint == fingerprint(paper.source, paper.implements).code
    assert entry.module.split(".")[2] == entry.family


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
    path = folder / "family" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text, encoding="utf-8")
    return folder


def test_claims_and_their_places_in_the_tour_are_read_from_the_text(tmp_path):
    (entry,) = papers.index(write(tmp_path, TEXT.replace("{number}", "1")))
    assert (entry.key, entry.tour) == ("key-1", (4, 12))
    assert [(claim.name, claim.statement, claim.kind, claim.reach) for claim in entry.claims] == [
        ("one", "one", "behaviour", "small"),
        ("two", "two", "exact", "exact"),
        ("three", "three", "exact", "exact"),
    ]
    assert entry.claims[0].control == "c"
    assert entry.summary == "Two sentences. Here (they) are."


def test_a_usage_may_contain_brackets_at_the_start_of_a_line(tmp_path):
    usage = '    usage="""\nx = print(\n    1,\n)\n""",\n    implements'
    (entry,) = papers.index(write(tmp_path, TEXT.replace("    implements", usage)))
    assert entry.usage == "\nx = print(\n    1,\n)\n"
    assert len(entry.claims) == 3


def test_other_decorators_may_stand_below_a_claim(tmp_path):
    text = TEXT.replace("def two(", "@torch.no_grad()\ndef two(").replace("tour=4)", 'tour=4, reach="real")')
    (entry,) = papers.index(write(tmp_path, text))
    assert [(claim.name, claim.reach) for claim in entry.claims] == [
        ("one", "real"),
        ("two", "exact"),
        ("three", "exact"),
    ]


def test_a_paper_may_have_a_folder_with_parts_of_its_own(tmp_path):
    write(tmp_path, TEXT.replace("{number}", "1"), "one/paper.py")
    write(tmp_path, "WIDTH = 3\n", "one/parts.py")
    write(tmp_path, "WIDTH = 3\n", "_shared.py")
    (entry,) = papers.index(tmp_path)
    assert entry.module == "paperworks.papers.family.one.paper"
    assert entry.file == tmp_path / "family" / "one" / "paper.py"


def test_the_family_is_the_folder(tmp_path):
    with pytest.raises(ValueError, match="says family='other' but lies in the folder 'family'"):
        papers.index(write(tmp_path, TEXT.replace('family="family"', 'family="other"')))


@pytest.mark.parametrize(
    "name",
    ["lora", "2106.09685", "arXiv:2106.09685", "https://arxiv.org/abs/2106.09685v2", "arxiv.org/pdf/2106.09685"],
)
def test_a_paper_is_found_by_key_or_arxiv_number(name):
    assert papers.find(name).key == "lora"
    assert papers.find("lora").url == "https://arxiv.org/abs/2106.09685"


def test_an_arxiv_number_of_several_papers_gives_all_or_asks_which():
    assert {entry.key for entry in papers.lookup("2305.14314")} == {"qlora", "nf4"}
    with pytest.raises(ValueError, match=r"is the reference of .*nf4.*; name one of them"):
        papers.find("2305.14314")
    with pytest.raises(ValueError, match=r"no paper of the reading list refers to arXiv:2999\.99999"):
        papers.lookup("2999.99999")


def test_a_papers_own_number_comes_before_one_that_another_cites():
    # another entry of the list, "gated", also refers to it
    assert any("2407.14435" in entry.arxiv[1:] for entry in ENTRIES)
    assert papers.find("2407.14435").arxiv[0] == "2407.14435"


def test_a_paper_may_stand_on_one_line(tmp_path):
    line = 'paper = Paper(key="k", title="t", authors="a", year=1, ref="r", family="f", summary="s", implements=())\n'
    (entry,) = papers.index(write(tmp_path, line.replace('"f"', '"family"') + "\nrest = (\n    1\n)\n"))
    assert (entry.key, entry.claims) == ("k", ())


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
        (TEXT.replace('"Table 1"', "PLACE"), "the values in `the claim 'one'` must be literals"),
        (TEXT.replace('kind="exact",\n', 'sort="exact",\n'), "the claim 'two' does not have the fields of a claim"),
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
