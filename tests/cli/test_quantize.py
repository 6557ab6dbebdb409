"""paperworks quantize on a small model: from the command line to a folder that loads, decodes and can be trained."""

import pytest
import torch

import paperworks as pw
from paperworks import adapt, compress
from paperworks.cli import main as cli
from paperworks.compress.formats import fourbit
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def folder(tmp_path):
    """A model of bytes: its tokenizer has one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=GatedMLP(hidden=64))
    pw.save(pw.build(Decoder(vocab_size=256, dim=32, depth=2, block=block, norm=RMSNorm())), tmp_path / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(folder, *arguments):
    return cli.main(["quantize", str(folder / "model"), "--out", str(folder / "out"), *arguments])


@pytest.mark.parametrize(
    "arguments",
    [("gptq", "--bits", "4", "--group", "16"), ("nf4",), ("q8_0",), ("wanda", "--pattern", "2:4"), ("aqlm",)],
    ids=" ".join,
)
def test_the_result_loads_decodes_and_can_be_trained(folder, capsys, arguments):
    data = ["--calibration", str(folder / "text.txt"), "--sequences", "4", "--length", "64"]
    code = run(folder, "--format", *arguments, *data, "--text", str(folder / "text.txt"))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "bits/weight" in said.out
    assert "before" in said.out
    assert not (folder / "out.unfinished").exists()
    model = pw.load(folder / "out")
    layers = compress.report(model).layers
    assert len(layers) == 14
    assert all(layer.error.output is not None for layer in layers)
    assert len(pw.generate(model, ["The quick"], max_new_tokens=4, temperature=0.0)) == 1
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    model(torch.randint(0, 256, (1, 8))).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("chosen", "group"), [((), 32), (("--group", "0"), None), (("--group", "8"), 8)])
def test_groups_divide_the_rows_unless_they_are_chosen(folder, capsys, chosen, group):
    assert run(folder, "--format", "rtn", *chosen) == 0
    said = capsys.readouterr()
    assert ("groups of 32: 128 does not divide every row" in said.err) == (chosen == ())
    layers = [layer for layer in pw.load(folder / "out").modules() if isinstance(layer, compress.CompressedLinear)]
    assert {layer.format.group for layer in layers} == {group}


def test_an_interrupted_run_goes_on(folder, capsys, monkeypatch):
    original, calls = compress.NF4.encode, []

    def interrupted(self, weight, statistics=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, weight, statistics)

    monkeypatch.setattr(fourbit.FourBit, "encode", interrupted)
    assert run(folder, "--format", "nf4") == 130
    assert not (folder / "out").exists()
    assert (folder / "out.unfinished").exists()
    assert run(folder, "--format", "nf4") == 0
    assert len(calls) == 6 + (14 - 5)
    assert not (folder / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gptq"), "gptq learns from data: give --calibration FILE"),
        (("--format", "nf4", "--bits", "4"), "nf4 has no choice of bits; it offers block"),
        (("--format", "gptq", "--bits", "9", "--calibration", "text.txt"), "bits must be 2 to 8, got 9"),
        (("--format", "nf4", "--group", "0"), "which nf4 does not have: leave --group out"),
        (("--format", "gpqt"), "did you mean 'gptq'"),
        (("--format", "rtn", "--group", "24"), "does not divide a row of 32 inputs; these do"),
        (("--format", "gptq", "--group", "16", "--calibration", "empty.txt"), "is empty"),
        (("--format", "gptq", "--group", "16", "--calibration", "image.bin"), "not a text file in UTF-8"),
        (("--format", "gptq", "--group", "16", "--calibration", "text.txt", "--length", "9999"), "smaller --length"),
        (("--format", "gptq", "--group", "16", "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_told_in_a_line_and_nothing_is_written(folder, capsys, arguments, message):
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.bin").write_bytes(bytes(range(256)))
    arguments = [str(folder / a) if a.endswith((".txt", ".bin")) else a for a in arguments]
    assert run(folder, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") <= 2
    assert not list(folder.glob("out*"))
