import math

import pytest
import torch
from torch import nn

from paperworks import adapt, compress
from paperworks.compress.formats.blockwise import decode_scales, dynamic_code, encode_scales
from paperworks.compress.formats.fourbit import NF4_CODES
from paperworks.core.linear import weight_of
from tests.parity.families import oracle

FORMATS = [compress.NF4(), compress.FP4(), compress.Int4(), compress.NF4(double_quantization=True)]


def test_nf4_codes_are_the_papers_quantiles():
    """The construction of Appendix E, from the normal distribution's inverse."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat((positive, negative, torch.zeros(1))).sort().values
    assert (codes / codes.max() - torch.tensor(NF4_CODES)).abs().max() < 2e-7  # catalogue: 1.2e-7


def test_storage_is_exactly_the_papers_bits():
    assert compress.NF4().bits_per_weight((512, 512)) == 4.5
    twice = compress.NF4(double_quantization=True).bits_per_weight((512, 512))
    assert abs(twice - (4 + 8 / 64 + 32 / (64 * 256) + 32 / 512**2)) < 1e-12  # the last term is the mean


def test_errors_on_normal_weights_are_the_measured_ones():
    """Catalogue: NF4 0.00846, int4 0.0116, FP4 0.0149 on N(0, 1) in blocks of 64, within 1%."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(3))
    for form, expected in ((compress.NF4(), 0.00846), (compress.Int4(), 0.0116), (compress.FP4(), 0.0149)):
        decoded = form.decode(form.encode(weight), (1024, 1024))
        assert abs(((decoded - weight).square().mean() / weight.square().mean()) / expected - 1) < 0.015


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (3, 50), (1, 1), (7, 3)])
def test_every_shape_decodes_to_the_nearest_codes(form, shape):
    weight = torch.randn(shape)
    stored = form.encode(weight)
    decoded = form.decode(stored, shape)
    assert decoded.shape == weight.shape
    flat = weight.flatten()
    scales = decode_scales(stored) if form.double_quantization else stored["scales"]
    for index, value in enumerate(flat.tolist()):
        block = index // form.block
        top = float(flat[block * form.block : (block + 1) * form.block].abs().max())
        nearest = min(form.values, key=lambda code: abs(value / top - code))
        assert abs(decoded.flatten()[index] - nearest * float(scales[block])) <= 1e-6 * top + 1e-7


@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_encoding_again_changes_nothing(form):
    once = form.decode(form.encode(torch.randn(16, 64)), (16, 64))
    assert torch.equal(form.decode(form.encode(once), (16, 64)), once)


def test_zeros_stay_zeros():
    for form in FORMATS:
        assert torch.equal(form.decode(form.encode(torch.zeros(4, 64)), (4, 64)), torch.zeros(4, 64))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_scales_and_values_equal_bitsandbytes(kind):
    from bitsandbytes import functional as bnb

    weight = torch.randn(96, 128)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    form = compress.NF4() if kind == "nf4" else compress.FP4()
    stored = form.encode(weight)
    assert torch.equal(stored["scales"], state.absmax)
    theirs, ours = packed.flatten(), stored["codes"]
    if kind == "fp4":  # they write minus zero (code 8) for small negative weights, we write zero
        theirs = torch.where(theirs >> 4 == 8, theirs & 15, theirs)
        theirs = torch.where(theirs & 15 == 8, theirs & 240, theirs)
    assert torch.equal(ours, theirs)
    decoded = form.decode(stored, (96, 128))
    assert (decoded - bnb.dequantize_4bit(packed, state)).abs().max() < 1e-6


@pytest.mark.parity
def test_double_quantization_equals_bitsandbytes():
    from bitsandbytes import functional as bnb

    assert torch.equal(dynamic_code(), bnb.create_dynamic_map(signed=True).sort().values)
    weight = torch.randn(512, 512)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = compress.NF4(double_quantization=True).encode(weight)
    assert torch.equal(stored["codes"], packed.flatten())
    assert abs(float(stored["scale_mean"]) - float(state.offset)) < 1e-6
    assert (stored["scale_scales"] - state.state2.absmax).abs().max() < 1e-6
    apart = (stored["scale_codes"].int() - state.absmax.int()).abs()
    assert (apart == 0).float().mean() > 0.99  # catalogue: the rest differ by one code
    assert apart.max() <= 1


def test_double_quantized_scales_lie_within_their_codes_distance():
    scales = torch.rand(1000) + 0.5
    error = (decode_scales(encode_scales(scales)) - scales).abs()
    assert error.max() < 0.5 * 0.5 * 0.02  # half the widest gap (0.0141) of the code, times the largest deviation


def test_compressed_layers_compute_with_the_decoded_weight_and_pass_gradients_on():
    layer = nn.Linear(64, 32)
    packed = compress.apply(nn.Sequential(layer), compress.NF4(), targets="0")[0]
    weight = packed.decoded_weight()
    x = torch.randn(5, 64, requires_grad=True)
    out = packed(x)
    assert (out - (x @ weight.T + layer.bias)).abs().max() < 1e-5
    out.square().sum().backward()
    expected = 2 * (x @ weight.T + layer.bias) @ weight
    assert (x.grad - expected).abs().max() < 1e-3


def test_layers_keep_their_stored_numbers_under_a_change_of_dtype():
    packed = compress.apply(nn.Sequential(nn.Linear(64, 32)), compress.NF4(), targets="0")
    before = {name: buffer.clone() for name, buffer in packed[0].stored.items()}
    packed.bfloat16()
    assert all(torch.equal(packed[0].stored[name], buffer) for name, buffer in before.items())
    assert packed[0].decoded_weight().dtype == torch.bfloat16
    assert packed(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dicts_round_trip_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    model = compress.apply(nn.Sequential(nn.Linear(64, 32)), compress.NF4(double_quantization=True), targets="0")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = compress.apply(nn.Sequential(nn.Linear(64, 32)), compress.NF4(double_quantization=True), targets="0")
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(model(x), other(x))


def test_report_counts_true_storage():
    model = compress.apply(oracle("llama2"), compress.NF4(), targets="all-linear")
    report = compress.report(model)
    assert len(report.layers) == 21
    assert report.bits_per_weight == 4.5
    assert "21 layers, 4.5000 bits/weight" in str(report)
    assert math.isnan(compress.report(nn.Linear(2, 2)).bits_per_weight)


def test_decompress_gives_plain_layers_with_the_same_function():
    model = compress.apply(oracle("gpt2"), compress.NF4(), targets="all-linear")
    tokens = torch.randint(1, 97, (1, 6))
    before = model(tokens).logits
    compress.decompress(model)
    assert not compress.report(model).layers
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)


def test_wrong_use_is_refused():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    with pytest.raises(ValueError, match="block must be even"):
        compress.NF4(block=3)
    compress.apply(model, compress.NF4(), targets="0")
    with pytest.raises(ValueError, match="0 is compressed already"):
        compress.apply(model, compress.NF4(), targets="*")
    assert type(model[1]) is nn.Linear  # nothing was done
    adapt.apply(model, adapt.LoRA(rank=2), targets="1")
    with pytest.raises(ValueError, match="carries an adapter"):
        compress.apply(model, compress.NF4(), targets="1")
    bad = nn.Linear(4, 4)
    nn.init.constant_(bad.weight, float("nan"))
    with pytest.raises(ValueError, match="0: NF4 cannot encode NaN or infinity; this weight holds 16"):
        compress.apply(nn.Sequential(bad), compress.NF4(), targets="0")
    assert weight_of(model[0]).shape == (32, 64)
