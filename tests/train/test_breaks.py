"""What is left when a run is broken off: killed anywhere, interrupted, out of disk, gone bad."""

import errno
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paperworks import train
from paperworks.core import atomic
from paperworks.train.runs import checkpoint
from paperworks.train.runs.folder import RunFolder

from .small import Language, classifier, examples, mean_loss, same_bits, weights

SETTINGS = train.Settings(steps=60, lr=0.02, save_every=4, keep=2, log_every=1)


def model() -> Language:
    return Language(dropout=0.3)


def loader() -> DataLoader:
    tokens = torch.randint(0, 11, (20, 6), generator=torch.Generator().manual_seed(2))
    return DataLoader(tokens, batch_size=4, shuffle=True)


def fit(run_dir: Path, trained: nn.Module | None = None, **options: Any) -> train.Report:
    return train.fit(trained or model(), train.next_token_loss, loader(), SETTINGS, run_dir=run_dir, **options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def slow_run(run_dir: Path) -> None:
    """Train in a child process that will be killed at some moment."""
    torch.set_num_threads(1)
    fit(run_dir, on_step=lambda step: time.sleep(0.01))


def dying_run(run_dir: Path, moment: str) -> None:
    """Train in a child process that kills itself at a chosen moment of the third checkpoint."""
    torch.set_num_threads(1)
    module, name, nth = MOMENTS[moment]
    original: Callable[..., Any] = getattr(module, name)
    calls = iter(range(10**6))

    def deadly(*arguments: Any, **options: Any) -> Any:
        if next(calls) == nth:
            die()
        return original(*arguments, **options)

    setattr(module, name, deadly)
    fit(run_dir)


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before the weights are written": (checkpoint, "save_file", 4),
    "between the two files": (checkpoint, "save_file", 5),
    "before the state is written": (checkpoint.json, "dumps", 3 * 5 - 1),
    "while the files are synced": (atomic, "_sync", 13),
    "before the folder is renamed": (atomic.Path, "rename", 2),
    "before an old checkpoint is set aside": (atomic.Path, "rename", 3),
    "before an old checkpoint is removed": (atomic.shutil, "rmtree", 7),
}


@pytest.fixture(scope="module")
def context() -> Any:
    """Children that start fast: forked from a process that has imported torch and never computed with it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "paperworks.train.loop"])
    return context


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    trained = model()
    fit(tmp_path_factory.mktemp("straight"), trained)
    return weights(trained)


def whole_checkpoints(run_dir: Path) -> list[int]:
    """Read every checkpoint there is, in full, and return their steps."""
    steps = []
    for path in RunFolder(run_dir).complete():
        checkpoint.read_weights(path)
        steps.append(checkpoint.read_state(path)["step"])
    return steps


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, context: Any, straight: dict[str, Tensor]
) -> None:
    draw = random.Random()  # another seed each time: the claim is about any moment
    kills, reached = 0, [0]
    for _ in range(25):
        child = context.Process(target=slow_run, args=(tmp_path,))
        child.start()
        child.join(timeout=0.05 + draw.random() * 0.35)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        steps = whole_checkpoints(tmp_path)
        assert max(steps, default=0) >= reached[-1]
        reached.append(max(steps, default=0))
        kills += child.exitcode != 0
        if child.exitcode == 0:
            break
    trained = model()
    report = fit(tmp_path, trained)
    assert kills >= 1
    assert report.steps == 60
    assert same_bits(weights(trained), straight)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_saving_leaves_the_checkpoints_whole(
    tmp_path: Path, context: Any, straight: dict[str, Tensor], moment: str
) -> None:
    child = context.Process(target=dying_run, args=(tmp_path, moment))
    child.start()
    child.join(timeout=600)  # a guard against hanging, nothing more
    assert child.exitcode == -signal.SIGKILL
    found = whole_checkpoints(tmp_path)
    assert found, "a complete checkpoint must be left"
    assert max(found) < 60
    trained = model()
    report = fit(tmp_path, trained)
    assert report.resumed_from == max(found)
    assert same_bits(weights(trained), straight)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000056", "step-000060"]  # nothing of the dead run is left


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["first", "second"])
def test_a_full_disk_leaves_the_checkpoint_before_whole_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, straight: dict[str, Tensor]
) -> None:
    original = checkpoint.save_file
    calls = iter(range(100))

    def filling(tensors: Any, path: Path) -> None:
        number = next(calls)
        if number == (4 if file == "first" else 5):
            path.write_bytes(b"half of it")
            full_disk()
        original(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", filling)
        with pytest.raises(OSError, match="No space left") as raised:
            fit(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert "step-000008" in raised.value.__notes__[0]
    assert whole_checkpoints(tmp_path) == [4, 8]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    trained = model()
    fit(tmp_path, trained)
    assert same_bits(weights(trained), straight)


def limited_run(run_dir: Path) -> None:
    """Train where the system itself refuses files above 10 kB, in the middle of writing them."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(step: int) -> bool:
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        return False

    try:
        train.fit(
            model(), train.next_token_loss, loader(), train.Settings(steps=9, save_every=4, log_every=100),
            run_dir=run_dir, on_step=limit,
        )  # fmt: skip
    except OSError as error:
        os._exit(17 if "step-000004" in error.__notes__[0] else 1)


def test_a_write_that_the_system_breaks_off_is_an_os_error_and_leaves_the_checkpoint_before(
    tmp_path: Path, context: Any
) -> None:
    child = context.Process(target=limited_run, args=(tmp_path,))
    child.start()
    child.join(timeout=600)  # a guard against hanging, nothing more
    assert child.exitcode == 17
    assert whole_checkpoints(tmp_path) == [4]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path, straight: dict[str, Tensor]) -> None:
    def press(step: int) -> bool:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(train.Interrupted, match=r"after step 7 of 60; saved in .*step-000007.* run_dir=") as raised:
        fit(tmp_path, on_step=press)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert (raised.value.report.steps, raised.value.report.stopped) == (7, "interrupted")
    assert signal.getsignal(signal.SIGINT) is before
    trained = model()
    assert fit(tmp_path, trained).resumed_from == 7
    assert same_bits(weights(trained), straight)


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved() -> None:
    def press(step: int) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(train.Interrupted, match="after step 1 of 60; nothing was saved"):
        train.fit(classifier(), mean_loss, examples(), SETTINGS, on_step=press)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    steps = []

    def press_twice(step: int) -> bool:
        steps.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C must not be put off")

    with pytest.raises(KeyboardInterrupt) as raised:
        train.fit(classifier(), mean_loss, examples(), SETTINGS, on_step=press_twice)
    assert not isinstance(raised.value, train.Interrupted)
    assert steps == [1]


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean_loss(model, batch) * (float("nan") if next(calls) == 9 else 1.0)

    calls = iter(range(100))
    with pytest.raises(train.Diverged, match="at step 10"):
        train.fit(classifier(), loss, examples(), SETTINGS, run_dir=tmp_path)
    assert whole_checkpoints(tmp_path) == [4, 8]


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    trained = classifier()

    def spoil(step: int) -> bool:
        if step == 8:
            with torch.no_grad():
                trained[3].bias[1] = float("inf")
        return False

    with pytest.raises(
        train.Diverged, match=r"after step 8 the weight 3\.bias is not finite; it was not saved"
    ) as raised:
        train.fit(trained, mean_loss, examples(), SETTINGS, run_dir=tmp_path, on_step=spoil)
    assert "step-000004" in raised.value.__notes__[0]
    assert whole_checkpoints(tmp_path) == [4]
