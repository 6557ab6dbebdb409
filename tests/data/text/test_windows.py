import pytest
import torch

from paperworks.data.text.windows import CharacterText, RandomWindows, ordered_windows

TEXT = torch.arange(1000)


def all_of(windows):
    return [(batch["tokens"], batch["targets"]) for batch in windows]


def test_every_target_is_the_token_after():
    for batch in RandomWindows(TEXT, length=7, batch=4, count=5):
        assert batch["tokens"].shape == batch["targets"].shape == (4, 7)
        assert torch.equal(batch["targets"], batch["tokens"] + 1)
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_the_batches_depend_on_the_seed_and_the_epoch_only():
    windows = RandomWindows(TEXT, length=7, batch=4, count=3, seed=5)
    first = torch.stack([tokens for tokens, _ in all_of(windows)])
    torch.rand(10)  # the global generator has no part in it
    assert torch.equal(first, torch.stack([tokens for tokens, _ in all_of(windows)]))
    windows.set_epoch(1)
    assert not torch.equal(first, torch.stack([tokens for tokens, _ in all_of(windows)]))
    other = RandomWindows(TEXT, length=7, batch=4, count=3, seed=6)
    assert not torch.equal(first, torch.stack([tokens for tokens, _ in all_of(other)]))
    assert len(windows) == 3


def test_random_windows_reach_both_ends_of_the_text():
    windows = RandomWindows(torch.arange(8), length=6, batch=64, count=1)
    assert set(next(iter(windows))["tokens"][:, 0].tolist()) == {0, 1}


def test_a_run_resumed_on_windows_sees_what_it_would_have_seen(tmp_path):
    from torch import nn

    from paperworks import train

    def run(steps, folder):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 1000))
        windows = RandomWindows(TEXT, length=5, batch=2, count=3)
        settings = train.Settings(steps=steps, schedule="constant", warmup=0, save_every=None, progress=False)
        train.fit(model, train.next_token_loss, windows, settings, run_dir=folder)
        return model

    whole = run(8, tmp_path / "whole")
    run(5, tmp_path / "parts")  # stops in the second epoch
    resumed = run(8, tmp_path / "parts")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ordered_windows_score_every_token_but_the_first_once():
    batches = ordered_windows(torch.arange(61), length=10, batch=4)
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert torch.equal(targets, torch.arange(1, 61))
    assert [len(batch["tokens"]) for batch in batches] == [4, 2]


def test_a_count_of_ordered_windows_is_spread_over_the_text():
    (batch,) = ordered_windows(torch.arange(101), length=10, count=5)
    assert batch["tokens"][:, 0].tolist() == [0, 20, 40, 60, 80]


def test_a_text_is_split_by_position_and_its_characters_are_known():
    text = CharacterText.of("abcd" * 20 + "xyz" * 6 + "!?", validation=0.2)
    assert text.tokenizer.decode(text.training.tolist()) == "abcd" * 20
    assert text.tokenizer.decode(text.validation.tolist()) == "xyz" * 6 + "!?"
    assert text.tokenizer.vocab_size == 9
    (batch,) = text.held_out_windows(length=19)
    assert torch.equal(batch["tokens"][0], text.validation[:19])
    assert all(int(batch["tokens"].max()) < 9 for batch in text.train_windows(length=4, batch=2, count=3))


def test_a_public_text_is_read_from_a_folder_of_data(monkeypatch, tmp_path):
    from paperworks.core.errors import AssetUnavailable

    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AssetUnavailable):
        CharacterText.load("tinyshakespeare")
    docs = CharacterText.load("python-docs")
    assert len(docs.training) > 8 * len(docs.validation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 1000}, "do not fit in a text of 1000"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"count": 0}, "count must be at least 1"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomWindows(TEXT, **({"length": 4, "batch": 2, "count": 2} | options))


@pytest.mark.parametrize("count", [0, 100])
def test_more_ordered_windows_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=f"between 1 and the 99 windows.*got {count}"):
        ordered_windows(TEXT, length=10, count=count)


def test_text_must_be_ids():
    with pytest.raises(ValueError, match=r"integer ids, got torch.float32 \(5,\)"):
        ordered_windows(torch.zeros(5), length=2)
