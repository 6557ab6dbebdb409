"""The package takes the recorded results with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """The files that building reads, and one module: copying the whole package would take a minute."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "paperworks").mkdir()
    shutil.copy(ROOT / "paperworks" / "__init__.py", tmp_path / "paperworks" / "__init__.py")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "lora.json").write_text(json.dumps({"key": "lora"}))
    (tmp_path / "results" / "lora-loss.svg").write_text("<svg/>")
    return tmp_path


def built(checkout):
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    return checkout / "built" / "paperworks"


def test_building_puts_the_results_into_the_package_and_leaves_figures_out(checkout):
    results = built(checkout) / "_results"
    assert json.loads((results / "lora.json").read_text()) == {"key": "lora"}
    assert [path.name for path in results.iterdir()] == ["lora.json"]


def test_building_twice_replaces_a_result(checkout):
    built(checkout)
    (checkout / "results" / "lora.json").write_text(json.dumps({"key": "lora", "scale": "small"}))
    results = built(checkout) / "_results"
    assert json.loads((results / "lora.json").read_text())["scale"] == "small"
