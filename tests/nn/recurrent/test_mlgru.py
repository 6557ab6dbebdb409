"""Lower bounds of forget gates that the layers of a stack learn together, and the model that is built of them."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from paperworks.models import Block, Decoder, DecoderModel, count_parameters
from paperworks.models.presets.matmul_free import matmul_free
from paperworks.nn import MLGRU, Attention, BitLinear, GatedMLP, Placement, RMSNorm, RoPE, Spec
from paperworks.nn.recurrent.mlgru import MLGRUModule, forget_bounds, layer_bounds
from paperworks.nn.ternary import TernaryLinear

TOKENS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def small(depth=3, **options) -> DecoderModel:
    torch.manual_seed(0)
    spec = matmul_free(16, depth, vocab_size=31, hidden=24, **options)
    return spec.build()


def learned(model):
    return [module for module in model.modules() if isinstance(module, MLGRUModule)]


def test_bounds_are_sums_of_shares_after_the_first_layer():
    weights = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = layer_bounds(weights)
    for channel in range(3):
        powers = [math.exp(value) for value in weights[:, channel].tolist()]
        expected = [sum(powers[1 : layer + 1]) / sum(powers) for layer in range(5)]
        assert found[:, channel].tolist() == pytest.approx(expected, abs=1e-15)
    assert not found[0].any()
    assert all(bool((low < high).all()) for low, high in itertools.pairwise(found))
    assert bool((found < 1).all())
    assert layer_bounds(torch.zeros(4, 1, dtype=torch.float64))[:, 0].tolist() == pytest.approx(forget_bounds(4))
    torch.autograd.gradcheck(layer_bounds, (weights.clone().requires_grad_(),))


def test_each_layer_of_a_stack_has_the_bound_of_its_place():
    model = small()
    layers = learned(model)
    with torch.no_grad():
        for layer in layers:
            layer.bound.normal_()
    weights = torch.stack([layer.bound for layer in layers])
    for place, layer in enumerate(layers):
        assert torch.equal(layer.lower_bound(), layer_bounds(weights)[place])
    alone = MLGRU(lower_bound="learned").build(16)
    assert not alone.lower_bound().any()


@torch.no_grad()
def test_a_layer_forgets_no_more_than_its_bound_allows():
    layer = learned(small().double())[2]
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bound = 2 / 3  # of the last of three layers with equal weights
    f = bound + (1 - bound) * torch.sigmoid(layer.forget(x))
    c = nn.functional.silu(layer.candidate(x))
    state, states = torch.zeros(2, 16, dtype=torch.float64), []
    for step in range(7):
        state = f[:, step] * state + (1 - f[:, step]) * c[:, step]
        states.append(state)
    expected = layer.output(torch.sigmoid(layer.gate(x)) * torch.stack(states, 1))
    assert (layer(x, Placement().resolve(2, 7, x.device)) - expected).abs().max() < 1e-12


def test_every_row_of_the_bounds_is_learned_and_saved_once():
    model = small()
    model(TOKENS).square().sum().backward()
    assert all(bool(layer.bound.grad.abs().sum() > 0) for layer in learned(model))
    rows = [name for name in model.state_dict() if name.endswith(".bound")]
    assert rows == [f"blocks.{layer}.mixer.bound" for layer in range(3)]


@torch.no_grad()
def test_copies_and_loaded_models_have_bounds_of_their_own():
    model = small()
    for layer in learned(model):
        layer.bound.normal_()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), model(TOKENS))
    learned(twin)[0].bound.add_(torch.randn(16))
    assert not torch.equal(twin(TOKENS), model(TOKENS))
    with torch.device("meta"):
        loaded = model.spec.build()
    loaded.load_state_dict(model.state_dict(), assign=True)
    loaded.tie()
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["paper", "reference"])
def test_the_model_decodes_token_by_token(gate):
    model = small(gate=gate).double().eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    cache = model.new_cache(2, 9)
    parts = [
        model(TOKENS[:, :4], Placement(cache=cache)),
        *(model(TOKENS[:, [place]], Placement(cache=cache)) for place in range(4, 9)),
    ]
    assert (torch.cat(parts, 1) - model(TOKENS)).abs().max() < 1e-10


def test_all_linear_layers_are_ternary_the_head_too():
    model = small()
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert isinstance(model.unembedding, TernaryLinear)
    assert Spec.from_dict(json.loads(json.dumps(model.spec.to_dict()))) == model.spec


def test_a_tied_head_may_be_ternary():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=GatedMLP(hidden=24))
    model = Decoder(vocab_size=31, dim=16, depth=1, norm=RMSNorm(), block=block, tied=True, head=BitLinear()).build()
    assert model.unembedding.weight is model.embedding.weight
    model(TOKENS).sum().backward()


def test_the_published_sizes():
    for (dim, depth), millions in (((1024, 24), 374), ((2048, 24), 1364), ((2560, 32), 2702)):
        assert count_parameters(matmul_free(dim, depth)) / 1e6 == pytest.approx(millions, abs=1)
    assert matmul_free(1024, 24).block.feedforward.hidden == 2816


def test_a_bound_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"lower_bound must be in \[0, 1\), got -0.1"):
        MLGRU(lower_bound=-0.1)
    with pytest.raises(ValueError, match="lower_bound must be"):
        MLGRU(lower_bound="learnt")
