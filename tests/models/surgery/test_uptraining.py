from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from paperworks.models import Block, Decoder, count_parameters
from paperworks.models.surgery.uptraining import pool_key_value_heads
from paperworks.nn import Attention, GatedMLP, Mixer, RMSNorm, RoPE

# Float32 sums of a few dozen terms in another order.
ROUNDING = 1e-5


def spec(heads=4, kv_heads=None, bias=False, tied=False):
    mixer = Attention(heads=heads, kv_heads=kv_heads, bias=bias, position=RoPE())
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=40))
    return Decoder(vocab_size=50, dim=32, depth=2, norm=RMSNorm(), block=block, tied=tied, init_std=0.2)


def tokens():
    return torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(3))


def randomize_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)


def share_heads(model, kv_heads):
    """Make the key-value heads inside each group equal."""
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.mixer.key, block.mixer.value):
                for parameter in linear.parameters():
                    groups = parameter.unflatten(0, (kv_heads, -1, block.mixer.head_dim))
                    groups.copy_(groups[:, :1].expand_as(groups).clone())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("method", ["mean", "first"])
@torch.no_grad()
def test_heads_that_share_their_weights_can_be_pooled_without_a_change(bias, kv_heads, method):
    model = spec(bias=bias).build()
    randomize_biases(model)
    before = model(tokens())
    assert (pool_key_value_heads(model, kv_heads, method)(tokens()) - before).abs().max() > 100 * ROUNDING
    share_heads(model, kv_heads)
    pooled = pool_key_value_heads(model, kv_heads, method)
    assert (pooled(tokens()) - model(tokens())).abs().max() < ROUNDING


@torch.no_grad()
def test_repeating_heads_and_pooling_them_again_is_the_identity():
    model = spec(kv_heads=2).build()
    repeated = spec().build()
    state = dict(model.state_dict())
    for name in state:
        if ".key." in name or ".value." in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    assert (repeated(tokens()) - model(tokens())).abs().max() < ROUNDING
    back = pool_key_value_heads(repeated, 2)
    assert back.spec == model.spec
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)  # the mean of two equal numbers


@torch.no_grad()
def test_the_mean_is_over_consecutive_heads():
    model = spec(bias=True).build()
    randomize_biases(model)
    pooled = pool_key_value_heads(model, 2)
    for kind in ("weight", "bias"):
        old = getattr(model.blocks[1].mixer.value, kind)
        new = getattr(pooled.blocks[1].mixer.value, kind)
        torch.testing.assert_close(new[:8], (old[:8] + old[8:16]) / 2)
        torch.testing.assert_close(new[8:], (old[16:24] + old[24:]) / 2)


@torch.no_grad()
def test_first_takes_the_first_head_of_each_group_and_random_neither():
    model = spec().build()
    old = model.blocks[0].mixer.key.weight
    first = pool_key_value_heads(model, 2, "first").blocks[0].mixer.key.weight
    assert torch.equal(first, torch.cat((old[:8], old[16:24])))
    random = pool_key_value_heads(model, 2, "random").blocks[0].mixer.key.weight
    assert random.shape == first.shape
    assert abs(float(torch.nn.functional.cosine_similarity(random.flatten(), first.flatten(), dim=0))) < 0.2
    assert 0.15 < random.std() < 0.25  # init_std is 0.2; 512 numbers


def test_parameters_and_cache_shrink_by_the_size_of_a_group():
    model = spec(bias=True).build()
    pooled = pool_key_value_heads(model, 1)
    saved = 2 * 2 * 3 * 8 * (32 + 1)  # layers, key and value, heads dropped, rows, (weights + bias)
    assert count_parameters(model) - count_parameters(pooled) == saved
    assert model.new_cache(2, 16).bytes() == 4 * pooled.new_cache(2, 16).bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_the_original_is_left_alone_and_the_copy_can_be_trained(tied):
    model = spec(tied=tied).build().eval()
    model.tokenizer = object()
    model.embedding.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pooled = pool_key_value_heads(model, 2)
    assert pooled.tokenizer is model.tokenizer
    assert not pooled.training
    assert (pooled.unembedding.weight is pooled.embedding.weight) == tied
    assert not pooled.embedding.weight.requires_grad
    pooled(tokens()).logsumexp(-1).sum().backward()
    assert pooled.blocks[0].mixer.key.weight.grad.abs().max() > 0
    with torch.no_grad():
        for parameter in pooled.parameters():
            parameter.zero_()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_layers_with_blocks_of_their_own_stay_a_tuple():
    base = spec()
    wide = replace(base.block, feedforward=GatedMLP(hidden=48))
    model = replace(base, block=(base.block, wide)).build()
    pooled = pool_key_value_heads(model, 2)
    assert [block.mixer.kv_heads for block in pooled.spec.block] == [2, 2]
    assert pooled.spec.block[1].feedforward.hidden == 48


@pytest.mark.parametrize("kv_heads", [0, 3, 8, -1])
def test_a_number_that_does_not_divide_the_heads_is_refused(kv_heads):
    with pytest.raises(ValueError, match=rf"got {kv_heads}; possible: \[1, 2, 4\]"):
        pool_key_value_heads(spec().build(), kv_heads)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        pool_key_value_heads(spec().build(), 2, "maen")


@dataclass(frozen=True, kw_only=True)
class PassingMixer(Mixer):
    def build(self, dim):
        return nn.Identity()


def test_a_mixer_that_is_not_attention_is_named():
    block = Block(norm=RMSNorm(), mixer=PassingMixer())
    model = Decoder(vocab_size=5, dim=4, depth=1, norm=None, block=block).build()
    with pytest.raises(ValueError, match="block 0 mixes with PassingMixer"):
        pool_key_value_heads(model, 1)


def test_a_wrapped_projection_is_refused_with_what_to_do():
    model = spec().build()

    class Wrapped(nn.Linear):
        pass

    model.blocks[1].mixer.key = Wrapped(32, 32, bias=False)
    with pytest.raises(TypeError, match=r"blocks.1.mixer.key is a Wrapped.*adapt.merge"):
        pool_key_value_heads(model, 2)
