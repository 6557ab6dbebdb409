"""RWKV-4 against the sum of its paper, transformers' model and the published sizes."""

import math
from dataclasses import replace

import pytest
import torch

from paperworks.models import count_parameters, preset
from paperworks.models.presets.families import rwkv4
from paperworks.nn import RWKV, Placement, RWKVChannelMix
from paperworks.nn.recurrent.rwkv import wkv


def draws(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_the_sum(key, value, decay, bonus):
    """The paper's equation 16, term by term."""
    rows = []
    for t in range(key.shape[1]):
        back = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        past = torch.exp(-back * decay + key[:, :t])
        present = torch.exp(bonus + key[:, t])
        rows.append(((past * value[:, :t]).sum(1) + present * value[:, t]) / (past.sum(1) + present))
    return torch.stack(rows, 1)


def arguments():
    made = [draws(2, 9, 5), draws(2, 9, 5, seed=1), draws(5, seed=2).exp(), draws(5, seed=3)]
    return [tensor.requires_grad_() for tensor in made]


def test_the_recurrence_equals_the_sum_with_its_gradients():
    ours, theirs = arguments(), arguments()
    found, expected = wkv(*ours)[0], by_the_sum(*theirs)
    assert (found - expected).abs().max() < 1e-14
    upstream = draws(2, 9, 5, seed=7)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-13


@torch.no_grad()
def test_a_constant_added_to_all_keys_cancels():
    key, value, decay, bonus = arguments()
    assert (wkv(key + 3.0, value, decay, bonus)[0] - wkv(key, value, decay, bonus)[0]).abs().max() < 1e-14


@torch.no_grad()
def test_the_first_token_has_only_its_own_value():
    key, value, decay, bonus = arguments()
    assert torch.equal(wkv(key[:, :1], value[:, :1], decay, bonus)[0], value[:, :1])


@torch.no_grad()
def test_large_keys_do_not_overflow():
    """The catalogue: keys up to 80 in float32, where the plain sum is infinite."""
    key, value, decay, bonus = (tensor.detach().float() for tensor in arguments())
    key = 80 * key / key.abs().max() + 40
    naive = torch.exp(key).cumsum(1)
    assert not torch.isfinite(naive).all()
    found = wkv(key, value, decay, bonus)[0]
    assert torch.isfinite(found).all()
    wide = wkv(key.double(), value.double(), decay.double(), bonus.double())[0]
    assert (found - wide).abs().max() < 1e-4  # keys of 120 have an absolute rounding of 4e-6


@torch.no_grad()
@pytest.mark.parity
def test_the_model_is_transformers():
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=3,
        attention_hidden_size=16,
        intermediate_size=64,
        rescale_every=0,
    )
    theirs, ours = RwkvForCausalLM(config).eval(), rwkv4(16, 3, vocab_size=29).build().eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    base = theirs.rwkv
    ours.embedding.load_state_dict(base.embeddings.state_dict())
    ours.embedding_norm.load_state_dict(base.blocks[0].pre_ln.state_dict())
    ours.norm.load_state_dict(base.ln_out.state_dict())
    ours.unembedding.load_state_dict(theirs.head.state_dict())
    for layer, block in enumerate(base.blocks):
        time, channel = ours.blocks[2 * layer], ours.blocks[2 * layer + 1]
        time.mixer_norm.load_state_dict(block.ln1.state_dict())
        channel.mixer_norm.load_state_dict(block.ln2.state_dict())
        for mine, other in ((time.mixer, block.attention), (channel.mixer, block.feed_forward)):
            for name in ("receptance", "key", "value", "output"):
                if hasattr(mine, name):
                    getattr(mine, name).load_state_dict(getattr(other, name).state_dict())
            for mine_name, name in (
                ("blend_key", "time_mix_key"), ("blend_value", "time_mix_value"),
                ("blend_receptance", "time_mix_receptance"), ("log_decay", "time_decay"), ("bonus", "time_first"),
            ):  # fmt: skip
                if hasattr(mine, mine_name):
                    getattr(mine, mine_name).copy_(getattr(other, name).flatten())
    tokens = torch.randint(0, 29, (2, 13))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_the_papers_formula_for_its_sizes():
    """2VD + 13 D^2 L + D (11 L + 4); the numbers themselves are checked with those of all presets."""
    for name, dim, layers in (("rwkv4-169m", 768, 12), ("rwkv4-14b", 5120, 40)):
        assert count_parameters(preset(name)) == 2 * 50_277 * dim + 13 * dim**2 * layers + dim * (11 * layers + 4)


@torch.no_grad()
def test_it_begins_as_the_paper_says():
    model = rwkv4(64, 3, vocab_size=9).build()
    first, last = model.blocks[0].mixer, model.blocks[4].mixer
    channel = torch.arange(64) / 63
    assert torch.allclose(first.log_decay, -5 + 8 * channel**0.7)
    assert torch.allclose(last.log_decay, -5 + 8 * channel**2.0)
    assert torch.allclose(first.bonus[:3], torch.tensor([0.0, 0.5, -0.5]) + math.log(0.3))
    assert torch.allclose(first.blend_key, torch.arange(64) / 64)
    assert torch.allclose(last.blend_value, torch.full((64,), 1.3))
    assert not any(part.weight.any() for part in (first.key, first.receptance, first.output))
    mixed = model.blocks[1].mixer
    assert not mixed.value.weight.any()
    assert torch.allclose(mixed.key.weight.t() @ mixed.key.weight, 4 * torch.eye(64), atol=1e-4)
    assert float(model.embedding.weight.std()) == pytest.approx(1e-4, rel=0.1)


@torch.no_grad()
def test_decoding_remembers_as_much_however_long_it_goes_on():
    for spec in (RWKV(), RWKVChannelMix()):
        mixer = spec.build(16)
        sizes = {mixer.new_cache(2, capacity, torch.float32, torch.device("cpu")).bytes() for capacity in (4, 4000)}
        assert len(sizes) == 1


@torch.no_grad()
def test_half_precision_keeps_its_sums_in_float32():
    mixer = RWKV().build(16).bfloat16()
    cache = mixer.new_cache(1, 8, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(1, 8, 16).bfloat16()
    assert mixer(x, Placement().resolve(1, 8, x.device).at(cache)).dtype == torch.bfloat16
    assert cache["state"].dtype == torch.float32


def test_a_width_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"RWKVChannelMix\.hidden must be at least 1, got 0"):
        replace(RWKVChannelMix(), hidden=0)
