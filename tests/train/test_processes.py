"""Two processes compute what one does: losses, logs, checkpoints; and stop together when one of them cannot go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paperworks import train
from paperworks.train.distributed import distribution
from tests.train import several

HERE = Path(several.__file__)


def launch(scenario: str, folder: Path, processes: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run a scenario in several processes that find each other over a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"PYTHONPATH": str(HERE.parents[2]), "MASTER_PORT": str(_free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE), scenario, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    ended = []
    for process in running:
        out, err = process.communicate(timeout=100)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def results(scenario: str, folder: Path, processes: int = 2) -> list[dict]:
    for process in launch(scenario, folder, processes):
        assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"{scenario}-{rank}.json").read_text()) for rank in range(processes)]


def numbers(tree) -> list[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [n for each in tree for n in numbers(each)] if isinstance(tree, list) else [float(tree)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, results("everything", folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, several.everything(folder)


@pytest.mark.parametrize("run", ["text", "uneven rows", "means", "whole micro-batches", "unused expert", "sharded"])
def test_losses_norms_and_counts_are_those_of_one_process(one, two, run):
    for process in two[1]:
        assert numbers(process[run]) == pytest.approx(numbers(one[1][run]), rel=1e-5, abs=1e-5)
    assert len(one[1][run]["losses"]) == 6
    assert one[1][run]["losses"][-1] < one[1][run]["losses"][0]


def test_a_sharded_run_writes_the_same_checkpoint(one, two):
    """The file of either loads anywhere: it holds whole tensors under the model's own names."""
    for folder in (one[0], two[0]):
        plain, shared = (train.latest(folder / name) for name in ("text", "sharded"))
        from safetensors.torch import load_file

        first, second = (load_file(path / "weights.safetensors") for path in (plain, shared))
        assert first.keys() == second.keys() == several.language_model().state_dict().keys() - {"unembedding.weight"}
        assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)


def test_only_the_first_process_logs(two):
    lines = (two[0] / "text" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_processes_draw_apart_and_stay_together(tmp_path):
    first, second = results("dropout", tmp_path)
    assert first["order"] == second["order"]
    assert sorted(first["order"][:6]) == list(range(6))
    assert first["masks"] != second["masks"]
    assert first["weights"] == second["weights"]


def test_a_killed_process_stops_the_others_with_one_message_and_the_run_goes_on_with_any_number(tmp_path):
    survivor, victim = launch("killed", tmp_path)
    assert victim.returncode == -signal.SIGKILL
    assert survivor.returncode not in (0, -signal.SIGKILL)
    assert "process 0 of 2 stops because another one has ended" in survivor.stderr
    assert train.latest(tmp_path).name == "step-000003"
    whole = _whole_run()
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        for place in ("plain", "shared"):
            shutil.copytree(tmp_path / "checkpoints", folder / place / "checkpoints")
        found = results("resumed", folder)[0] if processes == 2 else several.resumed(folder)
        for kind in ("plain", "shared"):
            assert found[kind]["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)


def _whole_run() -> dict:
    settings = replace(several.SETTINGS, schedule="constant", warmup=0)
    return several.fitted(several.language_model(), train.next_token_loss, several.texts(), settings)


def test_a_loss_that_is_not_finite_anywhere_stops_everybody_at_the_same_step(tmp_path):
    first, second = results("diverged", tmp_path)
    assert first["message"] == second["message"]
    assert "the loss is nan at step 3, batch 2 of epoch 0" in first["message"]


def test_batches_that_cannot_be_shared_out_say_what_would_do(tmp_path):
    for process in results("too_few", tmp_path):
        assert "rows cannot be shared out among 2 processes: give batches of at least 2 rows" in process["message"]


def test_one_process_shares_nothing():
    batch = torch.ones(3, 2)
    part, weight = distribution.share(batch, 0, 1)
    assert part is batch
    assert weight == 1.0
    assert distribution.totals(2.5, 3) == [2.5, 3]
