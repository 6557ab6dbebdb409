"""Every block of Python in the README runs by itself, and every guide from its first block to its last."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_blocks_to_run():
    assert len(BLOCKS) >= 8


@pytest.mark.asset
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs_alone(number, tmp_path, request, monkeypatch):
    block = BLOCKS[number]
    if '"smollm2"' in block:
        request.getfixturevalue("smollm2")  # skipped where the file cannot be had
    monkeypatch.chdir(tmp_path)
    exec(
        compile(block, f"README block {number}", "exec"), {"__name__": "__main__"}
    )  # its own names, as in a fresh shell


@pytest.mark.asset
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_runs_from_top_to_bottom(guide, tmp_path, request, monkeypatch):
    text = guide.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    if '"smollm2"' in text:
        request.getfixturevalue("smollm2")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{guide.name}, block {number}", "exec"), names)
