import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paperworks import train
from paperworks.core.errors import CorruptFile
from paperworks.train.runs import checkpoint

from .small import Language, classifier, examples, mean_loss, same_bits, weights

SETTINGS: dict[str, Any] = {"steps": 14, "lr": 0.02, "log_every": 1, "save_every": 4, "keep": 3}


def tokens() -> Tensor:
    return torch.randint(0, 11, (20, 6), generator=torch.Generator().manual_seed(2))


def loader() -> DataLoader:
    return DataLoader(tokens(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(4))


def stop_after(step: int) -> Any:
    return lambda taken: taken == step


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("stops", [[3], [4, 9], [1, 2, 13]])
@pytest.mark.parametrize(
    "extra",
    [{}, {"precision": "bfloat16"}, {"precision": "float16"}, {"accumulate": 3}, {"clip": None, "schedule": "wsd"}],
    ids=str,
)
def test_a_resumed_run_has_the_weights_and_metrics_of_one_without_a_break(
    tmp_path: Path, stops: list[int], extra: dict[str, Any]
) -> None:
    settings = train.Settings(**SETTINGS, **extra)
    whole = Language(dropout=0.4, tied=True)
    straight = train.fit(whole, train.next_token_loss, loader(), settings, run_dir=tmp_path / "straight")
    for index, stop in enumerate(stops):
        part = train.fit(
            Language(dropout=0.4, tied=True, seed=index),  # from the second on, the weights must be the checkpoint's
            train.next_token_loss,
            loader(),
            settings,
            run_dir=tmp_path / "broken",
            on_step=stop_after(stop),
        )
        assert part.stopped == "on_step"
        torch.rand(stop)  # the world goes on drawing in between
    last = Language(dropout=0.4, tied=True, seed=5)
    report = train.fit(last, train.next_token_loss, loader(), settings, run_dir=tmp_path / "broken")
    assert report.resumed_from == stops[-1]
    assert same_bits(weights(last), weights(whole))
    assert report.losses == straight.losses[stops[-1] :]
    assert without_seconds(report.records) == without_seconds(straight.records)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("straight", "broken")]
    assert without_seconds(list(map(json.loads, lines[0]))) == without_seconds(list(map(json.loads, lines[1])))
    assert report.counted == straight.counted
    seconds = [record["seconds"] for record in report.records]
    assert seconds == sorted(seconds)  # counted on over the breaks


@pytest.mark.parametrize(
    "make",
    [
        train.AdamW(betas=(0.8, 0.99)),
        train.Adam(),
        train.SGD(momentum=0.9, nesterov=True),
        train.RMSprop(momentum=0.5),
        train.RMSPropGraves(),
        train.Lion(weight_decay=0.1),
        train.PagedAdamW(budget=4096, page=64),
        train.ClipByValue(optimizer=train.SGD(momentum=0.9), limit=0.01),
        lambda groups: torch.optim.Adagrad(groups),
        lambda groups: torch.optim.Adafactor(groups),
        lambda groups: torch.optim.NAdam(groups),
        lambda groups: torch.optim.RAdam(groups, foreach=True),
    ],
)
def test_any_optimizer_is_resumed_exactly(tmp_path: Path, make: Any) -> None:
    settings = train.Settings(**SETTINGS, optimizer=make)
    one, other = classifier(), classifier()
    train.fit(one, mean_loss, examples(), settings)
    train.fit(other, mean_loss, examples(), settings, run_dir=tmp_path, on_step=stop_after(6))
    other = classifier(seed=3)
    train.fit(other, mean_loss, examples(), settings, run_dir=tmp_path)
    assert same_bits(weights(one), weights(other))


def test_optimizer_state_keeps_the_layout_of_its_weights(tmp_path: Path) -> None:
    """A kernel may take another path, with another rounding, where strides differ."""
    strides: list[list[tuple[int, ...]]] = []

    class Strided(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()
            strides.append([state["momentum_buffer"].stride() for state in self.state.values()])

    def run(stop: int) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()).to(memory_format=torch.channels_last)
        settings = train.Settings(**SETTINGS, optimizer=lambda groups: Strided(groups, momentum=0.9))
        batches = [torch.ones(2, 3, 3, 3)]
        loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
        train.fit(model, loss, batches, settings, run_dir=tmp_path, on_step=stop_after(stop))

    run(6)
    run(99)
    assert strides[0][0] == (12, 1, 6, 3)
    assert all(each == strides[0] for each in strides)


def test_optimizer_state_wider_than_the_weights_stays_wide(tmp_path: Path) -> None:
    class Wide(torch.optim.Optimizer):
        """SGD with momentum in float32 for bfloat16 weights."""

        def __init__(self, groups: Any) -> None:
            super().__init__(groups, {})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                    momentum.mul_(0.9).add_(p.grad.float())
                    p.sub_((group["lr"] * momentum).to(p.dtype))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])

    settings = train.Settings(**SETTINGS, optimizer=Wide)
    one, other = classifier().bfloat16(), classifier().bfloat16()
    train.fit(one, loss, examples(), settings)
    train.fit(other, loss, examples(), settings, run_dir=tmp_path, on_step=stop_after(6))
    train.fit(other, loss, examples(), settings, run_dir=tmp_path)
    assert same_bits(weights(one), weights(other))


def test_an_evaluation_changes_nothing_of_what_follows() -> None:
    settings = train.Settings(**SETTINGS)
    one, other = Language(dropout=0.4), Language(dropout=0.4)
    train.fit(one, train.next_token_loss, loader(), settings)
    seen = []

    def noisy(model: nn.Module) -> dict[str, float]:
        seen.append(model.training)
        return {"noise": torch.rand(()).item()}

    often = train.Settings(**SETTINGS, evaluate_every=3)
    report = train.fit(other, train.next_token_loss, loader(), often, evaluate=noisy)
    assert same_bits(weights(one), weights(other))
    assert seen == [False] * 5
    assert other.training
    assert [record["step"] for record in report.evaluations] == [3, 6, 9, 12, 14]


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    model = classifier()
    train.fit(model, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    again = classifier(seed=8)
    report = train.fit(again, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    assert (report.steps, report.resumed_from, report.losses) == (14, 14, [])
    assert same_bits(weights(again), weights(model))


def test_a_run_is_prolonged_before_its_decay_as_if_it_had_been_planned_so(tmp_path: Path) -> None:
    def settings(steps: int) -> train.Settings:
        return train.Settings(steps=steps, lr=0.02, warmup=2, schedule=train.WarmupStableDecay(decay=4))

    one, other = classifier(), classifier()
    train.fit(one, mean_loss, examples(), settings(20))
    train.fit(other, mean_loss, examples(), settings(10), run_dir=tmp_path, on_step=stop_after(6))
    train.fit(other, mean_loss, examples(), settings(20), run_dir=tmp_path)
    assert same_bits(weights(one), weights(other))


def test_every_difference_of_settings_model_and_optimizer_is_listed(tmp_path: Path) -> None:
    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 3, bias=False), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="differs from the one saved in") as raised:
        train.fit(other, mean_loss, examples(), train.Settings(**SETTINGS | {"lr": 0.5}, seed=1), run_dir=tmp_path)
    expected = [
        "settings.lr: was 0.02, now 0.5",
        "settings.seed: was 0, now 1",
        "weight 3.bias: was float32 (3,), is missing now",
        "weight 4.weight: is new, float32 (3,)",
        "weight 4.bias: is new, float32 (3,)",
        "weight 0.weight: was float32 (8, 4), now float32 (9, 4)",
        "weight 0.bias: was float32 (8,), now float32 (9,)",
        "weight 3.weight: was float32 (3, 8), now float32 (3, 9)",
        "optimizer: 3.bias was in group 1, now is not optimized",
        "optimizer: 4.weight is new, in group 1",
        "optimizer: 4.bias is new, in group 1",
    ]
    assert [line[4:] for line in str(raised.value).splitlines()[1:-1]] == expected


def test_another_optimizer_and_other_settings_of_it_are_differences(tmp_path: Path) -> None:
    def fit(make: Any) -> None:
        train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS, optimizer=make), run_dir=tmp_path)

    fit(lambda groups: torch.optim.SGD(groups, momentum=0.9))
    with pytest.raises(ValueError, match=r"optimizer: was torch\.optim\.sgd\.SGD, now torch\.optim\.adamw\.AdamW"):
        fit(train.AdamW())
    with pytest.raises(ValueError, match=r"optimizer group 0, momentum: was 0\.9, now 0\.5"):
        fit(lambda groups: torch.optim.SGD(groups, momentum=0.5))


def test_the_model_is_untouched_when_it_cannot_go_on(tmp_path: Path) -> None:
    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    model = classifier(seed=4)
    before = weights(model)
    with pytest.raises(ValueError, match="differs"):
        train.fit(model, mean_loss, examples(), train.Settings(**SETTINGS | {"lr": 0.5}), run_dir=tmp_path)
    assert same_bits(weights(model), before)


class Adapted(nn.Module):
    def __init__(self, base_seed: int = 0) -> None:
        super().__init__()
        self.base = classifier(base_seed).requires_grad_(False)
        self.delta = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.average += 0.1 * (x.mean() - self.average)
        return self.base(x) + self.delta(x)


def test_a_frozen_base_is_left_out_of_checkpoints_but_not_what_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other, third = Adapted(), Adapted(), Adapted()
    other.load_state_dict(one.state_dict())
    train.fit(one, mean_loss, examples(), train.Settings(**SETTINGS))
    train.fit(other, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path, on_step=stop_after(6))
    assert set(load_file(train.latest(tmp_path) / "weights.safetensors")) == {"delta.weight", "delta.bias", "average"}
    train.fit(third, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    assert same_bits(weights(one), weights(third))


def test_a_frozen_base_with_other_values_is_noticed(tmp_path: Path) -> None:
    train.fit(Adapted(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"weight base\.0\.weight: is frozen, but its values are not those"):
        train.fit(Adapted(base_seed=1), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)


def test_a_frozen_part_that_a_callback_moves_is_saved_with_the_rest(tmp_path: Path) -> None:
    def run(model: Adapted, stop: int, run_dir: Path | None) -> None:
        def follow(step: int) -> bool:  # a target network that follows
            with torch.no_grad():
                model.base[0].bias.add_(0.01 * model.delta.bias.mean())
            return step == stop

        train.fit(model, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=run_dir, on_step=follow)

    torch.manual_seed(0)
    one, other, third = Adapted(), Adapted(), Adapted()
    other.load_state_dict(one.state_dict())
    run(one, 99, None)
    run(other, 6, tmp_path)
    run(third, 99, tmp_path)
    assert same_bits(weights(one), weights(third))


def test_the_weights_of_a_checkpoint_are_the_models_own_state(tmp_path: Path) -> None:
    model = Language(tied=True)
    train.fit(model, train.next_token_loss, loader(), train.Settings(**SETTINGS), run_dir=tmp_path)
    saved = load_file(train.latest(tmp_path) / "weights.safetensors")
    assert "out.weight" not in saved  # tied: once is enough
    assert same_bits(saved, {name: tensor for name, tensor in weights(model).items() if name != "out.weight"})


def test_batch_normalization_keeps_its_running_statistics(tmp_path: Path) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    one, other = model(0), model(0)
    train.fit(one, mean_loss, examples(), train.Settings(**SETTINGS))
    train.fit(other, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path, on_step=stop_after(5))
    other = model(1)
    train.fit(other, mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    assert same_bits(weights(one), weights(other))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    settings = train.Settings(**SETTINGS | {"keep": 2})
    report = train.fit(classifier(), mean_loss, examples(), settings, run_dir=tmp_path)
    assert [path.name for path in report.checkpoints] == ["step-000012", "step-000014"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000012", "step-000014"]
    assert train.latest(tmp_path) == report.checkpoints[-1]
    assert train.latest(tmp_path / "nowhere") is None


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    with pytest.raises(FileExistsError, match="holds the checkpoint step-000014 of an earlier run"):
        train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path, resume=False)


def test_an_iterator_is_accepted_only_without_resuming(tmp_path: Path) -> None:
    settings = train.Settings(steps=3, log_every=1)
    with pytest.raises(ValueError, match="batches is an iterator"):
        train.fit(classifier(), mean_loss, iter(examples()), settings, run_dir=tmp_path)
    report = train.fit(classifier(), mean_loss, iter(examples()), settings, run_dir=tmp_path, resume=False)
    assert report.steps == train.fit(classifier(), mean_loss, iter(examples()), settings).steps == 3


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["gone", "short", "nonsense"])
def test_a_damaged_checkpoint_is_an_error_that_says_which_file(tmp_path: Path, file: str, damage: str) -> None:
    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    path = train.latest(tmp_path) / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "short" else b"\xff" * 100)
    with pytest.raises(CorruptFile, match=file):
        train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)


@pytest.mark.parametrize("state", ["[]", "{}", '{"format": 2}', '{"format": 1, "state": {}}', '{"format": 1}'])
def test_a_state_of_another_kind_is_refused(tmp_path: Path, state: str) -> None:
    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)
    (train.latest(tmp_path) / checkpoint.STATE).write_text(state)
    with pytest.raises(CorruptFile, match="step-000014"):
        train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path)


def test_the_folder_is_one_runs_own_while_it_trains(tmp_path: Path) -> None:
    code = []

    def second(step: int) -> bool:
        if step == 2 and os.fork() == 0:
            from paperworks.train.runs.folder import RunFolder

            try:
                with RunFolder(tmp_path).locked():
                    os._exit(0)
            except RuntimeError as error:
                os._exit(7 if "another process is training" in str(error) else 1)
        if step == 2:
            code.append(os.waitstatus_to_exitcode(os.wait()[1]))
        return False

    train.fit(classifier(), mean_loss, examples(), train.Settings(**SETTINGS), run_dir=tmp_path, on_step=second)
    assert code == [7]


def test_a_line_that_a_kill_tore_and_lines_ahead_of_the_checkpoint_are_cut(tmp_path: Path) -> None:
    settings = train.Settings(**SETTINGS)
    train.fit(classifier(), mean_loss, examples(), settings, run_dir=tmp_path, on_step=stop_after(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    train.fit(classifier(), mean_loss, examples(), settings, run_dir=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 15))
