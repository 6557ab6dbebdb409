"""The usage of every paper that has one runs, in a folder of its own."""

import pytest

from paperworks import api, papers
from paperworks.lab.usage import run_usage
from paperworks.testbeds.smollm2 import stand_in


@pytest.mark.parametrize("entry", [entry for entry in papers.index() if entry.usage], ids=lambda entry: entry.key)
def test_the_usage_of_a_paper_runs(entry, monkeypatch):
    load = api.load  # half a gigabyte of weights tells no more about the code than a small model
    monkeypatch.setattr(api, "load", lambda name, **options: stand_in() if name == "smollm2" else load(name, **options))
    assert run_usage(entry)
