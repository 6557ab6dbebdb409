import pytest
import torch

import paperworks as pw
from paperworks import checkpoints, compress
from paperworks.checkpoints import from_transformers, load_gguf, read_gguf, save_gguf
from paperworks.checkpoints.gguf.writer import write
from paperworks.core.errors import CorruptFile
from tests.parity.families import FAMILIES, oracle

WRITABLE = ["llama", "llama2", "llama3", "smollm2", "qwen2", "gemma"]
TOKENS = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def model(family="llama2"):
    return from_transformers(oracle(family))


@pytest.mark.parametrize("family", WRITABLE)
@torch.no_grad()
def test_models_round_trip_through_gguf_in_float32(tmp_path, family):
    before = model(family)
    save_gguf(before, tmp_path / "m.gguf", "F32")
    after = pw.load(tmp_path / "m.gguf")
    # F32 keeps every bit of the weights; frequencies are recomputed from the factor, which travels as float32
    assert (after(TOKENS) - before(TOKENS)).abs().max() < 1e-5
    for name, tensor in before.state_dict().items():
        # Gemma's gains travel with 1 added, which costs one rounding at 1; everything else keeps every bit
        allowed = 2**-23 if family == "gemma" and "norm" in name else 0.0
        assert (after.state_dict()[name] - tensor).abs().max() <= allowed, name


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama2", "smollm2", "qwen2"])  # it reads no gemma
@torch.no_grad()
def test_our_files_give_transformers_the_same_logits(tmp_path, family):
    """Its reader un-permutes and shifts by its own rules: ours must be their inverse."""
    import transformers

    before = model(family)
    save_gguf(before, tmp_path / "m.gguf", "F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert (theirs(TOKENS).logits - before(TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "relative"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_0", 0.6)])
@torch.no_grad()
def test_rounded_types_stay_near_and_kept_blocks_decode_to_the_same_numbers(tmp_path, kind, relative):
    before = model("llama2")  # rows of 32 and 48: the second takes the fallback under Q8_0 and Q4_0
    save_gguf(before, tmp_path / "m.gguf", kind)
    decoded, kept = pw.load(tmp_path / "m.gguf"), pw.load(tmp_path / "m.gguf", keep_quantized=True)
    error = (decoded(TOKENS) - before(TOKENS)).abs().max() / before(TOKENS).abs().max()
    assert 0 < error < relative
    assert (kept(TOKENS) - decoded(TOKENS)).abs().max() < 1e-5
    layers = compress.report(kept).layers
    assert len(layers) == (18 if kind.startswith("Q") else 0)  # 3 blocks x (4 attention + gate + up)
    if layers:
        assert {layer.bits_per_weight for layer in layers} == {8.5 if kind == "Q8_0" else 4.5}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WRITABLE)))
def test_what_gguf_cannot_say_yet_is_refused_and_nothing_is_written(tmp_path, family):
    with pytest.raises(ValueError, match=r"cannot be written as GGUF yet|no Hugging Face family"):
        save_gguf(model(family), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def rewritten(tmp_path, change):
    save_gguf(model(), tmp_path / "m.gguf", "F32")
    file = read_gguf(tmp_path / "m.gguf")
    metadata, tensors = dict(file.metadata), {name: (t.load(), "F32") for name, t in file.tensors.items()}
    change(metadata, tensors)
    write(tmp_path / "n.gguf", metadata, [(name, tensor, kind) for name, (tensor, kind) in tensors.items()])
    return tmp_path / "n.gguf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update({"general.architecture": "lama"}), "did you mean 'llama'"),
        (lambda m, t: m.pop("llama.block_count"), "llama.block_count should be a int, got None"),
        (lambda m, t: m.update({"llama.embedding_length": "big"}), "should be a int, got 'big'"),
        (lambda m, t: m.update({"llama.attention.head_count": 0}), "must be at least 1"),
        (lambda m, t: m.update({"llama.attention.key_length": 0}), "key_length must be at least 1, got 0"),
        (lambda m, t: m.update({"llama.block_count": 2**31}), "describes 2147483648 blocks but holds only"),
        (lambda m, t: m.update({"llama.block_count": 2}), "unexpected blk.2"),
        (lambda m, t: t.pop("blk.1.attn_q.weight"), "missing blk.1.attn_q.weight"),
        (
            lambda m, t: t.update({"blk.1.attn_q.weight": (torch.zeros(4, 4), "F32")}),
            r"shape \(4, 4\), expected \(32, 32\)",
        ),
        (lambda m, t: t.pop("token_embd.weight"), "holds no language model"),
    ],
)
def test_files_that_contradict_themselves_say_where(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_gguf(read_gguf(rewritten(tmp_path, change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update({"llama.rope.scaling.original_context_length": "far"}), "should be a int, got 'far'"),
        (lambda m, t: m.update({"llama.rope.scaling.original_context_length": [1, 2]}), "should be a int"),
        (lambda m, t: t.update({"rope_freqs.weight": (torch.ones(3), "F32")}), r"shape \(3,\), expected \(4,\)"),
        (lambda m, t: t.update({"rope_freqs.weight": (torch.full((4,), 3.0), "F32")}), "does not follow Llama 3.1"),
    ],
)
def test_rotary_divisors_that_make_no_sense_are_refused(tmp_path, change, message):
    def scaled(metadata, tensors):
        tensors["rope_freqs.weight"] = (torch.ones(4), "F32")  # heads of 8: four pairs
        change(metadata, tensors)

    with pytest.raises(ValueError, match=message):
        load_gguf(read_gguf(rewritten(tmp_path, scaled)))


def test_every_difference_is_listed_at_once(tmp_path):
    def change(metadata, tensors):
        tensors.pop("blk.0.attn_q.weight")
        tensors.pop("blk.2.ffn_up.weight")

    with pytest.raises(CorruptFile, match=r"(?s)blk.0.attn_q.weight.*blk.2.ffn_up.weight"):
        checkpoints.load(rewritten(tmp_path, change))


@pytest.mark.asset
@torch.no_grad()
def test_smollm2_kept_in_its_own_blocks_gives_the_same_logits(smollm2):
    from paperworks.data.assets import assets

    kept = pw.load(assets.fetch("smollm2"), keep_quantized=True)
    tokens = torch.tensor([smollm2.tokenizer.encode("The quick brown fox jumps over the lazy dog.")])
    assert torch.equal(kept(tokens), smollm2(tokens))
    assert compress.report(kept).bits_per_weight == 5.0  # Q4_1: 20 bytes for 32 weights
    assert sum(p.numel() for p in smollm2.parameters()) == 134_515_008
