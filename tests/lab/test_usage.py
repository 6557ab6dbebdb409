from pathlib import Path

import pytest

from paperworks.lab import Paper
from paperworks.lab.usage import run_usage


def with_usage(usage):
    return Paper(
        key="k", title="t", authors="a", year=2000, ref="r", family="f", summary="s", implements=(), usage=usage
    )


def test_usage_runs_in_a_namespace_and_a_folder_of_its_own():
    before = Path.cwd()
    names = run_usage(
        with_usage("""
from pathlib import Path
here = Path.cwd()
Path("written.txt").write_text("1")
""")
    )
    assert names["here"] != before
    assert not names["here"].exists()
    assert Path.cwd() == before
    assert "pytest" not in names


def test_usage_that_fails_raises_its_error_with_the_papers_key():
    before = Path.cwd()
    with pytest.raises(ZeroDivisionError) as caught:
        run_usage(with_usage("1 / 0"))
    assert "usage of paper 'k'" in caught.value.__notes__[0]
    assert Path.cwd() == before


def test_a_paper_without_usage_is_refused():
    with pytest.raises(ValueError, match="'k' has no usage"):
        run_usage(with_usage(""))
