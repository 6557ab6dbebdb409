"""Training with experts spread over two processes: losses, checkpoints and breaks as with one."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from paperworks import train
from tests.train import several
from tests.train.test_processes import launch, numbers, results


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, several.experts(folder)


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("spread", "frozen"):
        several.again(name, one[0], folder / "others")
    return folder, results("experts", folder)


RUNS = ("kept", "spread", "whole micro-batches", "computed again", "frozen", "left out")


@pytest.mark.parametrize("run", RUNS)
def test_losses_norms_and_auxiliary_losses_are_those_of_one_process(one, two, run):
    for process in two[1]:
        assert numbers(process[run]) == pytest.approx(numbers(one[1][run]), rel=1e-5, abs=1e-5)
    assert "auxiliary/balance" in one[1][run]["records"][0]
    if run in ("spread", "computed again"):
        assert one[1][run]["losses"] == pytest.approx(one[1]["kept"]["losses"], rel=1e-6)


def test_each_process_holds_its_share_of_the_experts(one, two):
    assert one[1]["numbers"] == 2 * 4 * 3 * 12 * 16  # layers, experts, matrices of 12 by 16
    assert [process["numbers"] for process in two[1]] == [one[1]["numbers"] // 2] * 2


@pytest.mark.parametrize("name", ["spread", "frozen", "left out"])
def test_the_checkpoint_is_whole_and_the_same(one, two, name):
    first, second = (train.latest(folder / name) for folder, _ in (one, two))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(first / file), load_file(second / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[key].float() - theirs[key].float()).abs().max() < 1e-5 for key in ours)
    ours, theirs = (json.loads((path / "state.json").read_text())["state"] for path in (first, second))
    assert ours["optimizer"] == theirs["optimizer"]
    assert ours["weights"] == theirs["weights"]


def test_every_process_can_have_the_whole_state(one, two):
    plain = several.mixture(several.Experts)
    for process in two[1]:
        assert process["state"].keys() == plain.state_dict().keys()
        assert numbers(process["state"]) == pytest.approx(numbers(one[1]["state"]), rel=1e-4, abs=1e-5)
    plain.load_state_dict({name: torch.tensor(values) for name, values in two[1][0]["state"].items()})


def test_a_run_goes_on_with_any_number_of_processes(one, two, tmp_path):
    for process in two[1]:
        for origin, name in (("own", "spread"), ("others", "spread"), ("others", "frozen")):
            assert process[f"{origin}, {name}"]["losses"] == pytest.approx(one[1][name]["losses"][3:], rel=1e-5)
    for name in ("spread", "frozen"):
        several.again(name, two[0], tmp_path / "others")
    found = several.experts(tmp_path)
    for name in ("spread", "frozen"):
        assert found[f"others, {name}"]["losses"] == pytest.approx(one[1][name]["losses"][3:], rel=1e-5)


def test_what_does_not_go_with_spread_experts_is_refused_by_all(two):
    first, second = (process["refused"] for process in two[1])
    assert first == second
    sharded, half, other, moved = first
    assert "sharded=True does not go with experts that are spread over processes" in sharded
    assert "precision='float16' does not go with experts" in half
    for index in range(2):
        assert other.count(f"blocks.{index}.feedforward.router.logits.weight") == 1
        # which only the second process has, and both must know of
        assert f"blocks.{index}.feedforward.experts.3.up.weight: is frozen, but its values are not those" in moved


def test_a_killed_process_stops_the_others_with_one_message(tmp_path):
    survivor, victim = launch("experts_killed", tmp_path)
    assert victim.returncode == -signal.SIGKILL
    assert survivor.returncode not in (0, -signal.SIGKILL)
    assert survivor.stderr.count("process 0 of 2 stops because another one has ended") == 1
    assert train.latest(tmp_path / "whole").name == "step-000003"
