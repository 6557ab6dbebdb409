"""Ternary layers against transformers', against integer sums, and what BitNet's equations say of scales."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paperworks import adapt
from paperworks.models import Block, Decoder
from paperworks.nn import MLGRU, Attention, BitLinear, GatedMLP, Placement, RMSNorm, RoPE, Spec
from paperworks.nn.recurrent.mlgru import forget_bounds
from paperworks.nn.ternary import SMALLEST, TernaryLinear, eight_bits, pack, ternary, unpack


def layer(inputs=12, outputs=7, bias=False, **options):
    torch.manual_seed(0)
    return BitLinear(**options).convert(nn.Linear(inputs, outputs, bias=bias))


def test_weights_are_minus_one_zero_and_one_times_their_mean_magnitude():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    signs, scale = ternary(weight)
    assert set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert scale == weight.abs().mean()
    for factor in (3.0, 0.25):
        other, other_scale = ternary(factor * weight)
        assert torch.equal(other, signs)
        assert other_scale.item() == pytest.approx(factor * scale.item(), rel=1e-6)
    zeros, least = ternary(torch.zeros(3, 3))
    assert not zeros.any()
    assert least.item() == pytest.approx(SMALLEST)


def test_gaussian_weights_lose_three_in_ten():
    """The catalogue: P(|w| < 0.5 * 0.798 sigma) = 0.310."""
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    zeros = (ternary(weight)[0] == 0).float().mean().item()
    assert zeros == pytest.approx(math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2)), abs=2e-3)
    assert zeros == pytest.approx(0.310, abs=2e-3)


def test_inputs_have_eight_bits_by_token():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    integers, step = eight_bits(x)
    assert integers.abs().amax(-1).tolist() == [127.0] * 5
    assert ((integers * step - x).abs() <= step / 2 * 1.0001).all()
    assert not eight_bits(torch.zeros(2, 3))[0].any()


@pytest.mark.parity
@pytest.mark.parametrize("norm", [False, True])
def test_it_is_transformers_layer(norm):
    from transformers.integrations.bitnet import AutoBitLinear

    ours = layer(norm=norm, eps=1e-6)
    theirs = AutoBitLinear(12, 7, bias=False, online_quant=True, use_rms_norm=norm, rms_norm_eps=1e-6)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # theirs compiles itself, which takes longer than all other tests
        found, expected = ours(x), theirs(y)
    assert (found - expected).abs().max() < 1e-5
    found.square().sum().backward()
    expected.square().sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-4
    assert (ours.weight.grad - theirs.weight.grad).abs().max() < 1e-4


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_it_needs_additions_only(bias):
    ours = layer(bias=bias).double()
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert (ours(x) - ours.accumulated(x)).abs().max() < 1e-13


def test_gradients_pass_straight_through_or_not_at_all():
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(4))
    through, blocked = layer(norm=False), layer(norm=False, straight_through=False)
    upstream = torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    (through(x) * upstream).sum().backward()
    integers, step = eight_bits(x)
    assert (through.weight.grad - upstream.t() @ (integers * step)).abs().max() < 1e-5
    (blocked(x) * upstream).sum().backward()
    # what is left goes through the scale: the same number times the sign of each weight
    left = blocked.weight.grad * torch.sign(blocked.weight)
    assert (left - left.mean()).abs().max() < 1e-6


@given(st.integers(1, 5), st.integers(1, 23), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_packing_round_trips(rows, columns, seed):
    signs = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(signs)
    assert packed.shape == (rows, math.ceil(columns / 5))
    assert torch.equal(unpack(packed, columns), signs)


def test_bytes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="only -1, 0 and 1 can be packed"):
        pack(torch.tensor([[2, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="at most 242, got 243"):
        unpack(torch.tensor([[243]], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="11 columns take 3 bytes a row, got 2"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 11)


def bitnet(**options):
    mixer = options.pop("mixer", Attention(heads=2, position=RoPE()))
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    sizes = {"vocab_size": 31, "dim": 16, "depth": 2, "norm": RMSNorm(), "init_std": 0.3}
    return Decoder(block=block, **{"linear": BitLinear()} | sizes | options)


@torch.no_grad()
def test_one_field_makes_a_model_ternary_and_it_decodes():
    spec = bitnet()
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    torch.manual_seed(0)
    model = spec.build().double().eval()
    layers = [module for module in model.blocks.modules() if isinstance(module, TernaryLinear)]
    assert len(layers) == 2 * 7
    assert isinstance(model.unembedding, nn.Linear)  # embedding and head stay in high precision
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 9)
    parts = [model(tokens[:, :4], Placement(cache=cache)), model(tokens[:, 4:], Placement(cache=cache))]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-10
    torch.manual_seed(0)
    plain = bitnet(linear=None).build()
    assert torch.equal(plain.blocks[0].mixer.output.weight.double(), model.blocks[0].mixer.output.weight)


def test_adapters_sit_on_ternary_layers():
    model = bitnet().build()
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bounds_rise_from_zero_and_stay_below_one():
    bounds = forget_bounds(6)
    assert bounds[0] == 0.0
    assert all(low < high < 1 for low, high in itertools.pairwise(bounds))
    with pytest.raises(ValueError, match="depth must be at least 1"):
        forget_bounds(0)
    with pytest.raises(ValueError, match=r"lower_bound must be in \[0, 1\), got 1.0"):
        MLGRU(lower_bound=1.0)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["paper", "reference"])
def test_the_mlgru_is_its_recurrence(gate):
    from paperworks.nn import Placement

    torch.manual_seed(0)
    module = MLGRU(gate=gate, lower_bound=0.25).build(6).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    f, c = 0.25 + 0.75 * torch.sigmoid(module.forget(x)), nn.functional.silu(module.candidate(x))
    state, states = torch.zeros(2, 6, dtype=torch.float64), []
    for step in range(7):
        state = f[:, step] * state + (1 - f[:, step]) * c[:, step]
        states.append(state)
    h, g = torch.stack(states, 1), module.gate(x)
    if gate == "paper":
        expected = module.output(torch.sigmoid(g) * h)
    else:
        rms = g * torch.rsqrt(g.square().mean(-1, keepdim=True) + 1e-6)
        expected = module.output(rms * module.norm.weight * nn.functional.silu(h))
    assert (module(x, Placement().resolve(2, 7, x.device)) - expected).abs().max() < 1e-13
