from html.parser import HTMLParser

import pytest

from paperworks.lab import Design, Lab, run, run_claim
from paperworks.lab.report import Section, render_report, write_report
from paperworks.lab.values import shown
from tests.lab.laboratory import make_paper

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Notes tags, attributes and text, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def sections():
    paper = make_paper()
    result = run(paper, "smoke", quiet=True)
    return [Section(paper=paper, outcome=outcome, images=result.images) for outcome in result.claims]


@pytest.fixture(scope="module")
def page(sections):
    return render_report(sections, title="A <tour>", lead="Lead & more", environment={"torch": "<2.13>"})


def test_the_report_is_well_formed_and_shows_everything(page):
    parsed = Page(page)
    assert parsed.open == []
    text = " ".join(" ".join(parsed.words).split())
    for expected in (
        *("A <tour>", "Lead & more", "A <Sample> & Its Claims", "Table 1: 7", "without it", "<2.13>"),
        *("Said <before>", "<script>alert(1)</script>", "the part fell off", "weights.gguf is not here"),
        *("error", "not run", "2.5", "ran"),
        *("it is better", "Arms over seeds", "real"),
    ):
        assert expected in text
    assert "seven" not in text  # a smoke run judges nothing, so its checks are not shown


def test_a_judged_claim_shows_checks_seeds_interval_reach_and_earlier_designs():
    paper = make_paper()
    outcome, images = run_claim(paper, paper.claims[-1], "small")
    earlier = [
        Design(hash="a", scale="small", seeds=[0], verdicts={"is_better": "one seed"}, date="2026-01-01"),
        Design(hash="b", scale="small", seeds=[0, 1], verdicts={"works": "holds"}),  # did not have this claim
    ]
    section = Section(paper=paper, outcome=outcome, images=images, earlier=earlier)
    page = render_report([section], title="t", lead="l", environment={})
    text = " ".join(" ".join(Page(page).words).split())
    for expected in (
        *("holds", "real, 5 seeds", "seed 4", "behaviour · real"),
        "with it beats without it on loss by at least 0.5: 1.2 (5 of 5 seeds)",
        *("loss, with it - without it", "-1.2", "95% interval", "first design: one seed, seeds 0, 2026-01-01"),
    ):
        assert expected in text
    assert "second design" not in text


def test_one_seed_is_shown_as_one_seed_only():
    paper = make_paper()
    outcome, images = run_claim(paper, paper.claims[0], "small")
    page = render_report([Section(paper=paper, outcome=outcome, images=images)], title="t", lead="l", environment={})
    assert '<span class="chip one-seed">one seed only</span>' in page


def test_nothing_in_the_report_comes_from_elsewhere_and_no_text_becomes_markup(page):
    parsed = Page(page)
    assert parsed.tags.count("script") == 1  # the switch between light and dark; the one in the text is text
    assert "link" not in parsed.tags
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:"))
    assert "@import" not in page
    assert "url(http" not in page


def test_the_drawing_follows_the_theme_of_the_page(page):
    assert "<svg" in page
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--ink)" in drawing
    assert "#1d2129" not in drawing


def test_a_png_is_carried_as_data(sections):
    lab = Lab(stem="x")
    section = sections[0]
    section.outcome.figures.append("x-cloud.png")
    page = render_report(
        [Section(paper=section.paper, outcome=section.outcome, images={"x-cloud.png": b"\x89PNG"})],
        title="t",
        lead="l",
        environment={},
    )
    section.outcome.figures.remove("x-cloud.png")
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert lab.images == {}


def test_the_report_is_written_into_a_folder_that_need_not_exist(sections, tmp_path):
    path = write_report(tmp_path / "new" / "tour.html", sections, title="t", lead="l", environment={})
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [child.name for child in path.parent.iterdir()] == ["tour.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.183631, "0.1836"),
        (4300, "4300"),
        (134515008, "134,515,008"),
        (123456.7, "123,457"),
        (2e-16, "2.00e-16"),
        (0.0, "0"),
        (True, "yes"),
        ([2, 3.5, "a"], "2, 3.5, a"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert shown(value) == text
