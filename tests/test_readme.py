"""Every block of Python in the README runs by itself."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
