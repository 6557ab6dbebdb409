import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paperworks import train
from paperworks.train.distributed import distribution

from .small import Language, classifier, examples, mean_loss, same_bits, summed_loss, weights


def test_a_model_learns() -> None:
    tokens = torch.arange(11).repeat(4, 3)[:, :30]
    model = Language()
    report = train.fit(model, train.next_token_loss, [tokens], train.Settings(steps=150, lr=0.03))
    assert report.losses[0] > 2
    assert report.losses[-1] < 0.3
    assert (report.steps, report.stopped, report.checkpoints) == (150, "finished", [])
    assert report.counted == 150 * 4 * 29


def test_importing_the_loop_imports_no_compiler() -> None:
    names = ("torch._dynamo", "torch._inductor")
    script = f"import sys, paperworks.train.loop; sys.exit(any(name in sys.modules for name in {names}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train.fit(classifier(), mean_loss, examples(), train.Settings(steps=3))
    assert list(tmp_path.iterdir()) == []


def test_the_log_has_a_line_every_so_many_steps_and_one_for_the_last(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        total, count = summed_loss(model, batch)
        return total, count, {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean()}

    settings = train.Settings(steps=8, log_every=3, schedule="constant", warmup=0, lr=0.5)
    report = train.fit(classifier(), loss, examples(), settings, run_dir=tmp_path, callbacks=[received.append])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == received == report.records
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert list(lines[0]) == ["step", "loss", "lr", "grad_norm", "seconds", "tokens", "accuracy"]
    assert [line["loss"] for line in lines] == [report.losses[k - 1] for k in (3, 6, 8)]
    assert [line["tokens"] for line in lines] == [15, 30, 40]
    assert all(line["lr"] == 0.5 and 0 <= line["accuracy"] <= 1 for line in lines)


def test_a_loss_that_counts_nothing_is_logged_in_items() -> None:
    settings = train.Settings(steps=4, log_every=2, accumulate=2)
    report = train.fit(classifier(), mean_loss, examples(size=5), settings)
    assert [record["items"] for record in report.records] == [20, 40]
    assert report.counted == 40


def test_a_number_json_does_not_know_is_null(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return mean_loss(model, batch), {"ratio": float("nan")}

    train.fit(classifier(), loss, examples(), train.Settings(steps=1), run_dir=tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["ratio"] is None


def test_evaluation_on_batches_measures_the_loss_in_evaluation_mode() -> None:
    model = classifier(dropout=0.5)
    settings = train.Settings(steps=4, evaluate_every=2)
    report = train.fit(model, summed_loss, examples(), settings, evaluate=examples(3, seed=8))
    assert [record["step"] for record in report.evaluations] == [2, 4]
    assert report.evaluations[-1]["evaluation"] == train.evaluate(model, summed_loss, examples(3, seed=8))


def test_on_step_may_end_the_run_after_a_step() -> None:
    seen = []

    def stop(step: int) -> bool:
        seen.append(step)
        return step == 5

    report = train.fit(classifier(), mean_loss, examples(), train.Settings(steps=50), on_step=stop)
    assert seen == [1, 2, 3, 4, 5]
    assert (report.steps, report.stopped, len(report.losses)) == (5, "on_step", 5)


def test_the_seed_decides_the_draws_of_training() -> None:
    def trained(seed: int | None, before: int) -> dict[str, Tensor]:
        model = classifier(dropout=0.5)
        torch.manual_seed(before)
        train.fit(model, mean_loss, examples(), train.Settings(steps=5, seed=seed))
        return weights(model)

    assert same_bits(trained(1, before=1), trained(1, before=2))
    assert not same_bits(trained(1, before=1), trained(2, before=1))
    assert not same_bits(trained(None, before=1), trained(None, before=2))


def test_a_model_in_evaluation_mode_is_trained_in_training_mode_and_given_back_as_it_was() -> None:
    model = classifier(dropout=0.5).eval()
    seen = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append([module.training for module in model.modules()])
        return mean_loss(model, batch)

    train.fit(model, loss, examples(), train.Settings(steps=1))
    assert all(seen[0])
    assert not any(module.training for module in model.modules())


def test_a_part_put_in_evaluation_mode_on_purpose_stays_there() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[1].eval()
    train.fit(model, mean_loss, examples(), train.Settings(steps=3))
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    assert model.training
    assert not model[1].training


def test_only_parameters_that_require_gradients_are_trained() -> None:
    model = classifier()
    model[0].requires_grad_(False)
    before = weights(model)
    train.fit(model, mean_loss, examples(), train.Settings(steps=3))
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.weight", "3.bias"}


def test_a_loss_with_parameters_of_its_own_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return mean_loss(model, batch) * self.temperature

    with pytest.raises(ValueError, match=r"the loss has parameters of its own \(temperature\)"):
        train.fit(classifier(), Scaled(), examples(), train.Settings(steps=1))


def test_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        train.fit(classifier(), mean_loss, [], train.Settings(steps=1))


def test_a_launcher_that_says_nothing_but_how_many_is_asked_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but RANK is not set"):
        train.fit(classifier(), mean_loss, examples(), train.Settings(steps=1))


def test_batches_of_any_nesting_move_and_keep_their_kind() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", ["x", "y"])
    x = torch.ones(2)
    batch = {"a": [x, (x, "text")], "b": Pair(x, 3)}
    moved = distribution.move(batch, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == moved["b"].x.device.type == "meta"
    assert moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].y == 3
    assert distribution.move(x, torch.device("cpu")) is x


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("shown", "stream", "drawn"), [(None, io.StringIO, False), (None, Terminal, True), (False, Terminal, False)]
)
def test_the_bar_is_drawn_on_a_terminal_only_and_not_if_unwanted(
    monkeypatch: pytest.MonkeyPatch, shown: bool | None, stream: type, drawn: bool
) -> None:
    out = stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    train.fit(classifier(), summed_loss, examples(), train.Settings(steps=30, progress=shown))
    text = out.getvalue()
    assert bool(text) is drawn
    if drawn:
        assert re.search(r"30/30.*loss \S+  lr \S+  [\d,]+ tokens/s", text)


def test_a_compiled_model_takes_the_same_steps_and_saves_under_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the graph is captured and run as it is: generating code for it would only test torch, and takes long
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    one, other = classifier(), classifier()
    train.fit(one, mean_loss, examples(), train.Settings(steps=3, compile=True), run_dir=tmp_path)
    train.fit(other, mean_loss, examples(), train.Settings(steps=3))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-5)  # float32 in another order
    assert same_bits(load_file(train.latest(tmp_path) / "weights.safetensors"), weights(one))
