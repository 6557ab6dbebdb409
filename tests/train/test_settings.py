import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from paperworks import train
from paperworks.train.settings import differences, rates_digest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"lr": -1e-3}, "lr is -0.001; it must be a positive"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 2.5}, "warmup is 2.5; it must be whole steps"),
        ({"warmup": 11, "steps": 10}, "at most the 10 steps"),
        ({"min_lr": 1.1}, "min_lr is 1.1; it must be a fraction"),
        ({"groups": ("*.bias",)}, "groups is ('*.bias',); it must be a tuple of train.Group"),
        ({"clip": 0.0}, "clip is 0.0; it must be a positive norm, or None"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"seed": -1}, "seed is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"save_every": -2}, "or None"),
        ({"keep": 0}, "keep is 0"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_would_be_right(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=r"is |unknown") as raised:
        train.Settings(**wrong)
    assert said in str(raised.value)


def test_a_schedule_that_is_neither_name_nor_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule is 3"):
        train.Settings(schedule=3)  # type: ignore[arg-type]


def test_equal_settings_are_equal_values() -> None:
    assert train.Settings(schedule="linear") == train.Settings(schedule=train.Linear())


def test_fields_that_only_observe_are_no_difference() -> None:
    one = train.Settings(steps=10)
    other = train.Settings(steps=10, log_every=3, save_every=7, evaluate_every=2, keep=9, progress=False)
    assert differences(one.described(), rates_digest(one, 5), 5, other) == []


def test_every_difference_is_listed() -> None:
    one = train.Settings(steps=10, lr=1e-3)
    other = train.Settings(steps=10, lr=2e-3, seed=4, precision="bfloat16")
    assert differences(one.described(), rates_digest(one, 5), 5, other) == [
        "settings.lr: was 0.001, now 0.002",
        "settings.precision: was 'float32', now 'bfloat16'",
        "settings.seed: was 0, now 4",
    ]


@pytest.mark.parametrize(("taken", "prolongable"), [(60, True), (80, True), (90, False)])
def test_a_run_can_be_prolonged_as_long_as_the_rates_taken_stay_the_same(taken: int, prolongable: bool) -> None:
    # warmup-stable-decay over 100 steps decays after step 80
    one = train.Settings(steps=100, warmup=5, schedule=train.WarmupStableDecay(decay=20))
    other = train.Settings(steps=500, warmup=5, schedule=train.WarmupStableDecay(decay=100))
    found = differences(one.described(), rates_digest(one, taken), taken, other)
    assert (found == []) is prolongable


def test_settings_and_schedules_do_not_import_torch() -> None:
    script = (
        "import sys; from paperworks.train import AdamW, Cosine, Group, Lion, PagedAdamW, Settings; "
        "Settings(optimizer=Lion()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("old", "place"),
    [
        ({"betas": (0.9, 0.95)}, "betas goes to optimizer=train.AdamW(betas=(0.9, 0.95))"),
        ({"eps": 1e-6}, "eps goes to optimizer=train.AdamW(eps=1e-06)"),
        ({"weight_decay": 0.1}, "weight_decay goes to optimizer=train.AdamW(weight_decay=0.1)"),
        ({"decay_embeddings": False}, 'groups=(train.Group("*embedding.weight", weight_decay=0.0),)'),
    ],
)
def test_a_keyword_of_earlier_versions_names_its_new_place(old: dict, place: str) -> None:
    with pytest.raises(TypeError) as raised:
        train.Settings(**old)
    assert place in str(raised.value)
    with pytest.raises(TypeError, match="has no field"):
        replace(train.Settings(), **old)


def test_fit_names_the_new_place_of_its_optimizer() -> None:
    with pytest.raises(TypeError, match=r"fit\(optimizer=...\) is Settings\(optimizer=...\) now"):
        train.fit(None, None, [], optimizer=train.SGD())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (train.AdamW, r"optimizer is the class train\.AdamW; give a value of it"),
        ("adamw", "optimizer is 'adamw'; give a value such as"),
    ],
)
def test_an_optimizer_that_is_no_value_and_no_function_is_refused(optimizer: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train.Settings(optimizer=optimizer)  # type: ignore[arg-type]


def test_another_optimizer_is_a_difference_and_the_same_one_is_none_also_after_json() -> None:
    def settings(momentum: float) -> train.Settings:
        groups = (train.Group("*.bias", weight_decay=0.0),)
        return train.Settings(steps=10, optimizer=train.SGD(momentum=momentum), groups=groups)

    saved = json.loads(json.dumps(settings(0.9).described()))
    rates = rates_digest(settings(0.9), 5)
    assert differences(saved, rates, 5, settings(0.9)) == []
    assert differences(saved, rates, 5, settings(0.5)) == [
        "settings.optimizer: was SGD(momentum=0.9, nesterov=False, weight_decay=0.0), "
        "now SGD(momentum=0.5, nesterov=False, weight_decay=0.0)"
    ]


def test_a_function_that_makes_the_optimizer_is_recorded_by_name() -> None:
    def made(groups: list) -> None: ...

    assert train.Settings(optimizer=made).described()["optimizer"] == f"{__name__}.{made.__qualname__}"
    assert train.Settings(optimizer=partial(made)).described()["optimizer"] == f"{__name__}.{made.__qualname__}"
