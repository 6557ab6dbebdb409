"""The ternary weight format: what BitLinear trained comes out as it was, in 1.6 or 2 bits."""

import copy
import json

import pytest
import torch
from torch import nn

from paperworks import adapt, compress
from paperworks.compress import files
from paperworks.compress.formats.ternary import Ternary
from paperworks.core.linear import weight_of
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, BitLinear, GatedMLP, RMSNorm, RoPE, Spec
from paperworks.nn.ternary import TernaryLinear, ternary

FORMATS = [Ternary(), Ternary(packing="bits"), Ternary(norm=1e-8, activations=False)]
TOKENS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bitnet(norm=True):
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=GatedMLP(hidden=24))
    spec = Decoder(
        vocab_size=31, dim=16, depth=2, norm=RMSNorm(), init_std=0.3, block=block, linear=BitLinear(norm=norm)
    )
    torch.manual_seed(0)
    return spec.build().eval()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(7, 23), (12, 40), (1, 1)])
def test_decoding_gives_the_equation_and_encoding_again_changes_nothing(form, shape):
    weight = normal(*shape)
    stored = form.encode(weight)
    gamma = weight.double().abs().mean()
    expected = (weight.double() / gamma).round().clamp(-1, 1) * gamma
    decoded = form.decode(stored, shape)
    assert (decoded - expected).abs().max() < 1e-6
    again = form.encode(decoded)
    assert torch.equal(form.decode(again, shape), decoded)
    bits = 8 * sum(tensor.nbytes for tensor in stored.values()) / weight.numel()
    assert form.bits_per_weight(shape) == pytest.approx(bits)


def test_a_ternary_matrix_of_any_share_of_zeros_keeps_its_scale():
    """mean |W| of a matrix with many zeros is not its scale; taking it would shrink the weights at every encoding."""
    signs = torch.zeros(5, 10)
    signs[0, 0], signs[3, 3] = 1.0, -1.0
    form = Ternary()
    assert torch.equal(form.decode(form.encode(0.7 * signs), (5, 10)), 0.7 * signs)
    assert not form.decode(form.encode(torch.zeros(5, 10)), (5, 10)).any()


def test_the_product_is_integers_times_scales():
    weight, x = normal(7, 23), normal(3, 4, 23, seed=1)
    form = Ternary()
    stored = form.encode(weight)
    signs, gamma = ternary(weight.double())
    steps = x.double().abs().amax(-1, keepdim=True) / 127
    expected = (x.double() / steps).round() @ signs.t() * steps * gamma
    assert (form.multiply(x, stored, (7, 23)) - expected).abs().max() < 1e-5
    assert form.multiply(x.double(), stored, (7, 23)).dtype == torch.float64
    left_alone = Ternary(activations=False)
    assert (left_alone.multiply(x, stored, (7, 23)) - x @ left_alone.decode(stored, (7, 23)).t()).abs().max() < 1e-6


@pytest.mark.parametrize("packing", ["digits", "bits"])
@torch.no_grad()
def test_a_trained_model_gives_the_same_logits_packed(packing):
    model = bitnet()
    before = model(TOKENS)
    compress.apply(model, Ternary(packing=packing, norm=1e-8))
    assert torch.equal(model(TOKENS), before)  # both add the same integers, and multiply in the same order
    report = compress.report(model)
    assert len(report.layers) == 14
    # rows of 16 take 4 bytes either way (16 = 3 * 5 + 1), and small matrices feel their scale
    assert report.bits_per_weight < 2.4


@torch.no_grad()
def test_a_packed_model_is_saved_and_loaded(tmp_path):
    model = compress.apply(bitnet(), Ternary(norm=1e-8))
    files.save(model, tmp_path / "packed.safetensors")
    fresh = bitnet()
    fresh.load_state_dict(bitnet().state_dict())
    other = files.load(fresh, tmp_path / "packed.safetensors")
    assert torch.equal((other or fresh)(TOKENS), model(TOKENS))


def test_formats_that_would_leave_out_the_norm_are_refused():
    for form in (Ternary(), Ternary(norm=1e-5), compress.NF4()):
        with pytest.raises(ValueError, match=r"normalizes its inputs.*use compress\.Ternary\(norm=1e-08\)"):
            compress.apply(bitnet(), form)
    compress.apply(bitnet(norm=False), compress.NF4())


def test_what_another_format_compresses_is_the_ternary_weight():
    layer = BitLinear(norm=False).convert(nn.Linear(12, 7))
    signs, scale = ternary(layer.weight)
    assert torch.equal(weight_of(layer), signs * scale)
    compressed = compress.apply(nn.Sequential(copy.deepcopy(layer)), compress.Int8(), targets="0")
    assert (weight_of(compressed[0]) - signs * scale).abs().max() < 1e-3 * scale


def test_gradients_pass_the_norm_and_straight_through_the_rounding():
    torch.manual_seed(0)
    trained = BitLinear().convert(nn.Linear(12, 7, bias=False))
    packed = compress.apply(nn.Sequential(copy.deepcopy(trained)), Ternary(norm=1e-8), targets="0")
    x, y = normal(5, 12).requires_grad_(), normal(5, 12).requires_grad_()
    trained(x).square().sum().backward()
    packed(y).square().sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-5


def test_adapters_train_on_a_packed_model():
    model = compress.apply(bitnet(), Ternary(norm=1e-8))
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    model(TOKENS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_round_trips_as_json_and_refuses_what_is_not_a_weight():
    assert Spec.from_dict(json.loads(json.dumps(Ternary(norm=1e-8).to_dict()))) == Ternary(norm=1e-8)
    with pytest.raises(ValueError, match="eps of 0 or more"):
        Ternary(norm=-1.0)
    with pytest.raises(ValueError, match="cannot encode NaN"):
        Ternary().encode(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="packing must be one of 'digits', 'bits'"):
        Ternary(packing="trits")


def test_every_layer_of_a_ternary_model_is_one():
    assert sum(isinstance(module, TernaryLinear) for module in bitnet().modules()) == 14
