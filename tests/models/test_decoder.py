from dataclasses import replace

import pytest
import torch

from paperworks.models import Block, Decoder, Parallel, PostNorm, PreNorm, Sandwich, count_parameters, preset
from paperworks.models.presets.families import presets
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, Placement, RMSNorm

# Published sizes (the catalogue's `exact` entries, and the checkpoints of 3.2, smollm2-360m/1.7b and phi3-medium).
PUBLISHED = {
    "gpt1": 116_534_784,
    # GPT-3: OpenAI's table of compute has them in millions (125, 356, 760, 1,320, 2,650, 6,660, 12,850, 174,600)
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "openelm-270m": 271_527_168,
    "openelm-450m": 457_179_136,
    "openelm-1.1b": 1_079_891_456,
    "openelm-3b": 3_036_647_424,
    "switch-base-8": 619_339_008,
    "switch-base-128": 7_415_217_408,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    # published as 2.58 billion and 0.15 of the embedding; 700M, 1.3B, 3B; 370M, 1.3B, 2.7B: counted here
    "afm-on-device": 2_730_071_552,
    "bitnet-b1.58-0.7b": 777_856_512,
    "bitnet-b1.58-1.3b": 1_338_935_296,
    "bitnet-b1.58-3b": 3_426_473_600,
    "matmul-free-370m": 373_892_096,
    "matmul-free-1.3b": 1_364_346_880,
    "matmul-free-2.7b": 2_701_642_240,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "nano": 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 256 * 128 + 128,
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "rwkv4-169m": 169_342_464,
    "rwkv4-430m": 430_397_440,
    "rwkv4-1.5b": 1_515_106_304,
    "rwkv4-3b": 2_984_627_200,
    "rwkv4-7b": 7_392_649_216,
    "rwkv4-14b": 14_148_597_760,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "phi3-mini": 3_821_079_552,
    "phi3-medium": 13_960_238_080,
}
# Pythia's Table 1 counts without the two tables.
PYTHIA = {
    "pythia-70m": 18_915_328,
    "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424,
    "pythia-1b": 805_736_448,
    "pythia-1.4b": 1_208_602_624,
    "pythia-2.8b": 2_517_652_480,
    "pythia-6.9b": 6_444_163_072,
    "pythia-12b": 11_327_027_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_their_published_sizes(name):
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_sizes_without_embeddings_are_the_papers_table(name):
    assert count_parameters(preset(name), embedding=False) == PYTHIA[name]


def test_every_preset_has_a_size_checked_above():
    assert set(presets()) == set(PUBLISHED) | set(PYTHIA) | {"pythia-14m"}  # 14m came after the paper
    assert count_parameters(preset("pythia-14m")) == 14_067_712


def test_presets_are_found_by_glob_and_near_misses_are_named():
    assert presets("llama2*") == ["llama2-7b", "llama2-13b", "llama2-70b"]
    with pytest.raises(ValueError, match="did you mean 'llama2-7b'"):
        preset("llama2-7")


def small(**changes):
    block = Block(norm=LayerNorm(), mixer=Attention(heads=2, bias=True), feedforward=MLP(hidden=16))
    return Decoder(**{"vocab_size": 11, "dim": 8, "depth": 2, "block": block, "norm": LayerNorm(), **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(depth=3, block=(small().block,) * 2), "2 specs but depth is 3"),
        (lambda: small(dim=9), r"heads \(2\) must divide dim \(9\)"),
        (lambda: small(context=8, position=LearnedPositions(length=4)), "exceeds the 4 learned positions"),
        (lambda: small(vocab_size=0), "vocab_size must be at least 1"),
        (lambda: replace(small().block, arrangement="parallel"), "Block.arrangement must be"),
    ],
)
def test_specs_that_cannot_exist_fail_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\(batch, time\), got \(3,\)"),
        (torch.zeros(1, 3), "must be int64, got torch.float32"),
        (torch.tensor([[3, 11]]), "token id 11 is outside the vocabulary of 11"),
        (torch.tensor([[-1]]), "token id -1"),
        (torch.zeros(1, 0, dtype=torch.int64), "empty"),
        (torch.zeros(1, 9, dtype=torch.int64), "9 tokens exceed the context of 8.*YaRNScaling"),
    ],
)
def test_wrong_tokens_are_refused_with_a_reason(tokens, message):
    with pytest.raises(ValueError, match=message):
        small(context=8).build()(tokens)


def test_learned_positions_say_when_a_given_position_is_beyond_them():
    model = small(position=LearnedPositions(length=4)).build()
    with pytest.raises(ValueError, match="position 7 is beyond the 4"):
        model(torch.zeros(1, 1, dtype=torch.int64), Placement(positions=torch.tensor([[7]])))


def reference(block, x, placement):
    """The four arrangements, straight from their equations."""
    mixer, feedforward = block.mixer, block.feedforward
    norm1, norm2 = block.mixer_norm, block.feedforward_norm
    if isinstance(block.arrangement, PreNorm):
        x = x + mixer(norm1(x), placement)
        return x + feedforward(norm2(x))
    if isinstance(block.arrangement, PostNorm):
        x = norm1(x + mixer(x, placement))
        return norm2(x + feedforward(x))
    if isinstance(block.arrangement, Parallel):
        return x + mixer(norm1(x), placement) + feedforward((norm2 or norm1)(x))
    x = x + block.mixer_post_norm(mixer(norm1(x), placement))
    return x + block.feedforward_post_norm(feedforward(norm2(x)))


ARRANGEMENTS = {
    "pre": PreNorm(),
    "post": PostNorm(),
    "parallel": Parallel(),
    "sandwich": Sandwich(),
    "shared": Parallel(shared_norm=True),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_block_arrangements_are_their_equations(arrangement):
    from paperworks.nn import Placement

    spec = replace(small().block, arrangement=ARRANGEMENTS[arrangement])
    block = spec.build(8).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    placement = Placement().resolve(2, 5, x.device)
    assert (block(x, placement) - reference(block, x, placement)).abs().max() < 1e-12


def test_tied_unembedding_is_one_tensor_and_gets_both_gradients():
    model = small(tied=True).build()
    assert model.unembedding.weight is model.embedding.weight
    assert count_parameters(model) == count_parameters(model.spec)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert (model.embedding.weight.grad[5] != 0).any()  # token 5 was not in the input: this came from the output side


def test_residual_outputs_start_smaller_with_depth():
    """Catalogue, gpt2: with the 1 / sqrt(2 depth) factor the final residual variance does not depend on depth."""
    variances = []
    for depth in (4, 16):
        block = Block(norm=LayerNorm(), mixer=Attention(heads=4, bias=True), feedforward=MLP(hidden=512))
        spec = Decoder(vocab_size=64, dim=128, depth=depth, block=block, norm=None)
        model = spec.build()
        with torch.no_grad():
            variances.append(model.hidden(torch.randint(0, 64, (4, 64))).var().item())
    assert 0.0018 < variances[0] < 0.0030  # measured in the catalogue: 0.0024
    assert abs(variances[0] / variances[1] - 1) < 0.2


def test_last_gives_the_same_logits_as_the_whole():
    model = small().build()
    tokens = torch.randint(0, 11, (2, 6))
    assert torch.allclose(model(tokens, last=2), model(tokens)[:, -2:], atol=1e-6)


def test_positions_may_be_shifted_under_rope_without_a_change():
    from paperworks.nn import RoPE

    mixer = Attention(heads=2, position=RoPE())
    model = small(block=Block(norm=RMSNorm(), mixer=mixer, feedforward=MLP(hidden=8))).build()
    tokens = torch.randint(0, 11, (1, 6))
    shifted = model(tokens, Placement(positions=torch.arange(6)[None] + 1000))
    assert (shifted - model(tokens)).abs().max() < 1e-4
