import json
from dataclasses import replace

import pytest
import torch

import paperworks as pw
from paperworks import adapt, checkpoints, compress
from paperworks.core.errors import CorruptFile
from paperworks.models import Block, Decoder, Encoder, Seq2Seq
from paperworks.nn import Attention, CrossAttention, GatedMLP, RelativeBuckets, RMSNorm, RoPE


def model(**changes):
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=GatedMLP(hidden=24))
    spec = Decoder(**{"vocab_size": 31, "dim": 16, "depth": 2, "block": block, "norm": RMSNorm(), **changes})
    return pw.build(spec).eval()


TOKENS = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_folders_round_trip_bit_for_bit(tmp_path, tied, dtype):
    before = model(tied=tied).to(dtype)
    pw.save(before, tmp_path / "m")
    after = pw.load(tmp_path / "m")
    assert after.spec == before.spec
    assert after.dtype == dtype
    assert torch.equal(after(TOKENS), before(TOKENS))
    assert (after.unembedding.weight is after.embedding.weight) == tied
    assert not after.training


def test_encoders_and_encoder_decoders_round_trip_with_their_shared_tables(tmp_path):
    looking = Block(
        norm=RMSNorm(),
        mixer=Attention(heads=2, causal=False, position=RelativeBuckets(bidirectional=True)),
        feedforward=GatedMLP(hidden=24),
    )
    writing = Block(norm=RMSNorm(), mixer=Attention(heads=2), cross=CrossAttention(heads=2))
    sizes = {"vocab_size": 31, "dim": 16, "depth": 3, "norm": RMSNorm()}
    encoder = Encoder(block=looking, token_types=2, **sizes)
    both = Seq2Seq(encoder=replace(encoder, token_types=0), decoder=Decoder(block=writing, tied=True, **sizes))
    for name, spec, inputs in (("one", encoder, (TOKENS,)), ("two", both, (TOKENS, TOKENS))):
        before = pw.build(spec).eval()
        pw.save(before, tmp_path / name)
        after = pw.load(tmp_path / name)
        assert after.spec == spec
        assert torch.equal(after(*inputs), before(*inputs))
        stack = after if name == "one" else after.encoder
        assert len({id(block.mixer.relative.weight) for block in stack.blocks}) == 1
    assert after.decoder.unembedding.weight is after.encoder.embedding.weight


def test_shards_round_trip(tmp_path):
    before = model()
    checkpoints.save_native(before, tmp_path / "m", max_shard_bytes=4000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert torch.equal(pw.load(tmp_path / "m")(TOKENS), before(TOKENS))


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.native, "write_shards", full_disk)
        with pytest.raises(OSError, match="No space left"):
            pw.save(model(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [pw.save, pw.export, checkpoints.save_native, checkpoints.save_folder])
def test_writers_of_folders_refuse_a_folder_with_content(tmp_path, write):
    (tmp_path / ".git").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds \.git, thesis\.tex already"):
        write(model(context=64), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "thesis.tex"]


def test_loading_writes_nothing(tmp_path):
    pw.save(model(), tmp_path / "m")
    (tmp_path / ".m.previous").mkdir()
    (tmp_path / ".m.previous" / "mine").touch()
    pw.load(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.previous", "m"]
    assert (tmp_path / ".m.previous" / "mine").exists()


@pytest.mark.parametrize("layout", ["huggingface", "gguf"])
def test_exports_refuse_adapters_and_compressed_layers_instead_of_leaving_them_out(tmp_path, layout):
    target = tmp_path / ("m.gguf" if layout == "gguf" else "m")
    adapted = adapt.apply(model(context=64), adapt.LoRA(rank=2), targets="attention")
    with pytest.raises(ValueError, match=r"adapters .*adapt\.merge"):
        pw.export(adapted, target, layout=layout)
    packed = compress.apply(model(context=64), compress.Int8(), targets="feedforward")
    with pytest.raises(ValueError, match=r"compressed layers .*compress\.decompress"):
        pw.export(packed, target, layout=layout)
    added = model(context=64)
    added.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="no place for extra"):
        pw.export(added, target, layout=layout)
    assert list(tmp_path.iterdir()) == []
    pw.export(compress.decompress(packed), target, layout=layout)
    assert target.exists()


def test_flipped_bits_are_noticed(tmp_path):
    pw.save(model(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-77] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptFile):
        pw.load(tmp_path / "m")


@pytest.mark.parametrize("cut", [0, 5, 50, 2000])
def test_truncated_weights_are_noticed(tmp_path, cut):
    pw.save(model(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptFile):
        pw.load(tmp_path / "m")


def _respec(folder, change):
    path = folder / "spec.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["spec"].update(dim=32), r"embedding.weight has shape \(31, 16\), expected \(31, 32\)"),
        (lambda h: h["spec"].update(depth=3), "missing blocks.2.mixer.query.weight"),
        (lambda h: h["spec"].update(depth=1), "unexpected blocks.1"),
        (lambda h: h["spec"].update(depth=10**9), "describes 1000000000 blocks but holds only"),
        (lambda h: h["spec"].update(type="RMSNorm"), "does not describe a model"),
        (lambda h: h.pop("spec"), "does not describe a model"),
        (lambda h: h.update(format=99), "format 99, this version reads 2"),
    ],
)
def test_specs_that_do_not_fit_the_weights_list_what_differs(tmp_path, change, message):
    pw.save(model(), tmp_path / "m")
    _respec(tmp_path / "m", change)
    with pytest.raises(CorruptFile, match=message):
        pw.load(tmp_path / "m")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'smollm2'"):
        pw.load("smollm")
    with pytest.raises(ValueError, match="It is a preset"):
        pw.load("gpt2")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        pw.load("./nothing-here")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        pw.load(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"never executed.*weights_only=True"):
        pw.load(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises((ValueError, FileNotFoundError)):
        pw.load(tmp_path)


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path):
    adapted = adapt.apply(model(), adapt.LoRA(rank=2))
    with pytest.raises(ValueError, match="merge or save its adapters first"):
        pw.save(adapted, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_hostile_configs_are_refused(tmp_path):
    from paperworks.checkpoints.families import spec_from_config

    good = {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    assert spec_from_config(good).dim == 16
    for change, message in (
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_size": "16"}, "Decoder.dim must be int"),
        ({"num_attention_heads": 0}, "heads must be at least 1"),
        ({"num_key_value_heads": 3}, "must divide heads"),
        ({"rope_scaling": {"type": "yam"}}, "or 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"hidden_act": "gelo"}, "unknown activation in config.json 'gelo'; did you mean 'gelu'"),
        ({"rms_norm_eps": None}, "wrong kind"),
    ):
        with pytest.raises(ValueError, match=message):
            spec_from_config(good | change)
    # transformers takes the class's default, and so do we: the weights' shapes then refuse what is not so wide
    assert spec_from_config({key: value for key, value in good.items() if key != "hidden_size"}).dim == 4096


def test_specs_no_family_expresses_are_not_exported(tmp_path):
    from paperworks.nn import LayerNorm

    odd = model(norm=LayerNorm())
    with pytest.raises(ValueError, match="no Hugging Face family expresses this model"):
        pw.export(odd, tmp_path / "m")
    assert not (tmp_path / "m").exists()
