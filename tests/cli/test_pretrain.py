"""paperworks pretrain, from a text to a folder that loads; interrupted, resumed, and by two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import paperworks as pw
from paperworks.cli import main as cli

SPEC = """
dim: 16
depth: 2
tied: true
context: 32
norm: {type: RMSNorm}
block:
  type: Block
  norm: {type: RMSNorm}
  mixer: {type: Attention, heads: 2, position: {type: RoPE}}
  feedforward: {type: GatedMLP, hidden: 24}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def arguments(folder, *more, out="out"):
    return [
        *("pretrain", str(folder / "text.txt"), "--model", str(folder / "spec.yaml"), "--out", str(folder / out)),
        *("--length", "16", "--batch", "4", "--steps", "8", "--evaluate-every", "4", "--save-every", "4"),
        *("--lr", "0.01", "--validation", "0.2", *more),
    ]


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_a_text_becomes_a_model_that_loads_and_writes(folder, capsys, tokenizer):
    code = cli.main(arguments(folder, "--tokenizer", tokenizer, "--vocab-size", "280"))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "tokens to train on" in said.out
    assert said.err.count("held-out loss") == 2
    model = pw.load(folder / "out" / "model")
    assert model.spec.vocab_size == model.tokenizer.vocab_size
    assert model.spec.depth == 2
    assert isinstance(pw.generate(model, "The quick", max_new_tokens=3), str)
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["evaluation"]["loss"] for record in records if "evaluation" in record]
    assert losses[-1] < losses[0]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_an_interrupted_run_goes_on_and_ends_the_same(folder, monkeypatch, capsys):
    assert cli.main(arguments(folder, out="whole")) == 0
    from paperworks import train

    fit = train.fit

    def interrupted(*given, **options):
        return fit(*given, **options, on_step=lambda step: step == 5)

    monkeypatch.setattr(train, "fit", interrupted)
    assert cli.main(arguments(folder)) == 0  # stops after step 5, as after Ctrl-C; its end is thrown away
    import shutil

    shutil.rmtree(folder / "out" / "model")
    monkeypatch.setattr(train, "fit", fit)
    assert cli.main(arguments(folder)) == 0
    whole, resumed = weights(folder / "whole"), weights(folder / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("more", [(), ("--sharded",)], ids=["replicated", "sharded"])
def test_two_processes_end_where_one_does(folder, more):
    assert cli.main(arguments(folder, out="one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "paperworks"]
    done = subprocess.run(
        [*command, *arguments(folder, *more, out="two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    one, two = weights(folder / "one"), weights(folder / "two")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_the_optimizer_on_the_command_line_trains_is_recorded_and_must_stay_the_same(folder, capsys):
    lion = ("optimizer:lion", "--optimizer.weight-decay", "0.5")
    assert cli.main(arguments(folder, *lion)) == 0, capsys.readouterr().err
    newest = sorted((folder / "out" / "checkpoints").iterdir())[-1]
    recorded = json.loads((newest / "state.json").read_text())["state"]["settings"]["optimizer"]
    assert recorded == {"type": "Lion", "betas": [0.9, 0.99], "weight_decay": 0.5}
    (folder / "out" / "model").rename(folder / "elsewhere")
    assert cli.main(arguments(folder, "optimizer:adamw")) == 2
    assert "settings.optimizer: was Lion(" in (said := capsys.readouterr().err)
    assert "now AdamW(betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1)" in said


def test_documents_can_be_kept_apart(folder, capsys):
    rows = "\n".join(json.dumps({"text": f"number {index} is {index * index}"}) for index in range(60))
    (folder / "text.jsonl").write_text(rows)
    given = arguments(folder, "--tokenizer", "bpe", "--vocab-size", "280", "--separate")
    given[1] = str(folder / "text.jsonl")
    assert cli.main(given) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nanno"), "unknown preset 'nanno'; did you mean 'nano'"),
        (("--model", "{}/none.yaml"), "no spec at"),
        (("--length", "64"), "--length 64 exceeds the model's context of 32"),
        (("--separate",), "--separate needs a tokenizer with an end-of-text token"),
        (("--tokenizer", "words"), "unknown tokenizer 'words'"),
        (("--validation", "0.0003"), "held-out text is shorter than two tokens"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(folder, capsys, change, message):
    change = [part.format(folder) for part in change]
    assert cli.main(arguments(folder, *change)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out" / "model").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "describes a list; a spec is a mapping"),
        ("dim: [", "neither YAML nor JSON"),
        ("dim: 16\ndepht: 2\n", "unknown field of Decoder 'depht'; did you mean 'depth'"),
        (SPEC.replace("heads: 2", "heads: 3"), "Attention.heads (3) must divide dim (16)"),
        ("!!python/object/apply:os.system [ls]", "neither YAML nor JSON"),
    ],
)
def test_a_spec_that_cannot_be_says_why(folder, capsys, text, message):
    (folder / "spec.yaml").write_text(text)
    assert cli.main(arguments(folder)) == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(folder, capsys):
    assert cli.main(arguments(folder)) == 0
    assert cli.main(arguments(folder)) == 2
    assert "is there already" in capsys.readouterr().err
