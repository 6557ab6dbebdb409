import pytest
import torch
from torch import nn

from paperworks import interpret
from paperworks.interpret.lenses.logit_lens import direct_logit_attribution, logit_lens
from paperworks.interpret.residual import ResidualStream, decompose, frozen_norm, head_outputs, residual_stream
from paperworks.models import Block, Decoder, Parallel, PostNorm, PreNorm, Sandwich
from paperworks.nn import MLP, Attention, GatedMLP, LayerNorm, LearnedPositions, NoNorm, RMSNorm, RoPE
from tests.parity.families import oracle

TOKENS = torch.randint(1, 31, (3, 7), generator=torch.Generator().manual_seed(0))


def randomized(spec):
    """Random gains and biases too, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = spec.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def llama_like(**changes):
    block = Block(
        norm=RMSNorm(), mixer=Attention(heads=4, kv_heads=2, position=RoPE()), feedforward=GatedMLP(hidden=24)
    )
    fields = {"vocab_size": 31, "dim": 16, "depth": 3, "block": block, "norm": RMSNorm(), "init_std": 0.3}
    return randomized(Decoder(**{**fields, **changes}))


def gpt2_like(arrangement=PreNorm()):
    block = Block(
        norm=LayerNorm(), mixer=Attention(heads=4, bias=True), feedforward=MLP(hidden=24), arrangement=arrangement
    )
    return randomized(
        Decoder(
            vocab_size=31,
            dim=16,
            depth=3,
            block=block,
            norm=LayerNorm(),
            position=LearnedPositions(length=9),
            tied=True,
            init_std=0.3,
        )
    )


MODELS = {
    "llama": llama_like,
    "gpt2": gpt2_like,
    "parallel": lambda: gpt2_like(Parallel()),
    "sandwich": lambda: gpt2_like(Sandwich()),
    "no norms": lambda: llama_like(block=Block(norm=NoNorm(), mixer=Attention(heads=2)), norm=None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_parts_add_up_to_the_stream_with_and_without_heads(kind):
    model = MODELS[kind]()
    heads = kind != "sandwich"  # there the norm after the mixer is what writes, so heads are no terms of the sum
    for split in {False, heads}:
        parts = decompose(model, TOKENS, heads=split)
        with interpret.record(model, "blocks.2") as seen, torch.no_grad():
            model(TOKENS)
        assert torch.equal(parts.final, seen["blocks.2"])
        assert (parts.parts.sum(0) - parts.final).abs().max() < 1e-5  # float32, some twenty additions
    assert parts.names[0] == "embedding"
    assert ("blocks.1.mixer.heads.1" in parts.names) == heads


def test_each_heads_output_is_its_slice_of_the_projection():
    model = llama_like()
    with interpret.record(model, ["blocks.1.mixer", "blocks.1.mixer.heads"]) as seen, torch.no_grad():
        model(TOKENS)
    each = head_outputs(seen["blocks.1.mixer.heads"], model.blocks[1].mixer.output)
    for head in range(4):
        alone = torch.zeros_like(seen["blocks.1.mixer.heads"])
        alone[:, :, head] = seen["blocks.1.mixer.heads"][:, :, head]
        assert (model.blocks[1].mixer.output(alone.flatten(2)) - each[:, :, head]).abs().max() < 1e-6
    assert (each.sum(2) - seen["blocks.1.mixer"]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_direct_attribution_adds_up_to_the_logit_difference(kind):
    model = MODELS[kind]()
    answer, against = torch.tensor([3, 5, 7]), torch.tensor([4, 4, 4])
    place = torch.tensor([2, 4, 6])
    logits = model(TOKENS).detach()[torch.arange(3), place]
    rows = torch.arange(3)
    for other in (None, against):
        found = direct_logit_attribution(model, TOKENS, answer, other, at=place, heads=kind != "sandwich")
        expected = logits[rows, answer] - (0 if other is None else logits[rows, other])
        assert (found.total - expected).abs().max() < 1e-5
        assert (found.values.sum(0) - expected).abs().max() < 1e-4  # a sum of parts up to ten times the total
        assert ("norm.bias" in found.names) == (kind in ("gpt2", "parallel", "sandwich"))
    assert found.ranked(3)[0][1] == found.values.mean(1)[found.values.mean(1).abs().argmax()].item()


def test_a_norm_of_each_part_alone_would_not_add_up():
    """The pitfall that the frozen scale avoids."""
    model = llama_like()
    parts = decompose(model, TOKENS)
    apart = (sum(model.norm(part) for part in parts.parts) - model.norm(parts.final)).abs().max()
    linear, bias = frozen_norm(model.norm, parts.final)
    assert bias is None
    assert (sum(linear(part) for part in parts.parts) - model.norm(parts.final)).abs().max() < 1e-5
    assert apart > 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_the_lens_after_all_blocks_is_the_output_bit_for_bit(kind):
    model = MODELS[kind]()
    with torch.no_grad():
        logits = model(TOKENS)
    found = logit_lens(model, TOKENS)
    assert len(found) == 4
    assert torch.equal(found[-1], logits)
    assert not torch.allclose(found[0], found[-1])
    tops = logit_lens(model, TOKENS, lambda each: each.argmax(-1))
    assert torch.equal(tops[2], found[2].argmax(-1))


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama2", "gpt2", "pythia"])
def test_transformers_models_decompose_at_their_own_paths_and_agree_with_ours(family):
    from paperworks.checkpoints import from_transformers

    theirs = oracle(family)
    ours = from_transformers(theirs)
    with torch.no_grad():
        output = theirs(TOKENS, output_hidden_states=True)
    parts, converted = decompose(theirs, TOKENS), decompose(ours, TOKENS)
    assert (parts.parts[0] - output.hidden_states[0]).abs().max() < 1e-6
    scale = parts.parts.abs().max()
    assert (parts.parts - converted.parts).abs().max() < 1e-5 * scale
    lens = logit_lens(ours, TOKENS)
    theirs_lens = logit_lens(theirs, TOKENS)
    assert (lens[-1] - output.logits).abs().max() < 1e-4 * output.logits.abs().max()
    for one, other in zip(lens, theirs_lens, strict=True):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
    answer = torch.tensor([3, 5, 7])
    ours_found = direct_logit_attribution(ours, TOKENS, answer, heads=False)
    theirs_found = direct_logit_attribution(theirs, TOKENS, answer, heads=False)
    assert (ours_found.values - theirs_found.values).abs().max() < 1e-4 * ours_found.values.abs().max()


def test_wrong_input_is_refused_with_what_would_be_right():
    model = llama_like()
    post = gpt2_like(PostNorm())
    with pytest.raises(ValueError, match=r"arranged as PostNorm\(\)"):
        residual_stream(post)
    with pytest.raises(ValueError, match="do not know where the residual stream of Sequential"):
        decompose(nn.Sequential(nn.Linear(2, 2)), TOKENS)
    with pytest.raises(ValueError, match=r"one token a row, \(3,\); got \(2,\)"):
        direct_logit_attribution(model, TOKENS, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no sum of parts"):
        direct_logit_attribution(llama_like(logit_soft_cap=5.0), TOKENS, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"heads x head_dim = 16.*Record `blocks.N.mixer.heads`"):
        head_outputs(torch.zeros(1, 2, 3, 4), model.blocks[0].mixer.output)
    where = ResidualStream("embedding", ("blocks.2",), ("blocks.0.mixer",), "norm", "unembedding")
    with pytest.raises(ValueError, match="add up to another stream"):
        decompose(model, TOKENS, stream=where)
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.mixer'"):
        decompose(model, TOKENS)["blocks.0.mixr"]
    with pytest.raises(ValueError, match="Softmax is neither a LayerNorm nor an RMSNorm"):
        frozen_norm(nn.Softmax(-1), torch.randn(3, 7, 16))
    with pytest.raises(ValueError, match="no taps named `heads`"):
        decompose(oracle("llama2"), TOKENS, heads=True)
