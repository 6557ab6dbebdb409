import pytest
import torch
from torch.nn import functional as F

import paperworks as pw
from paperworks import adapt, compress
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.fourbit import FP4, NF4, NF4_CODES, Int4
from paperworks.compress.linear import CompressedLinear
from paperworks.generation.matvec import fast_linears
from paperworks.kernels.packed import GROUPS, Packed, pack, two_grids
from paperworks.models.presets.families import llama

SHAPE = (48, 256)
EXACT = [
    compress.Uniform(bits=4, group=32),
    compress.Uniform(bits=4, group=64, symmetric=True),
    compress.Uniform(bits=3, group=None),
    compress.Uniform(bits=2, group=128),
    compress.GPTQ(bits=4, group=128),
    compress.AWQ(bits=4, group=64),
    compress.GGML(kind="Q4_0"),
    compress.GGML(kind="Q4_1"),
    compress.GGML(kind="Q4_K"),
]
NEAR = [NF4(), NF4(double_quantization=True), FP4(), Int4(block=32)]
NOT = [compress.Int8(), compress.GGML(kind="Q6_K"), compress.Uniform(bits=8, group=None), compress.QuIP(bits=2),
       compress.Uniform(bits=4, group=None, granularity="column"), compress.AQLM(bits=4, epochs=1, steps=1),
       compress.GPTQ(bits=4, group=64, act_order=True)]  # fmt: skip


def stored(form):
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=draws)
    statistics = Statistics.of(torch.randn(600, SHAPE[1], generator=draws)) if form.needs else None
    return form.encode(weight, statistics)


def apart(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("form", EXACT, ids=str)
def test_grids_are_the_decoded_weight(form):
    held = stored(form)
    assert apart(form.grids(held, SHAPE).weight, form.decode(held, SHAPE)) < 1e-6  # sums of float32


@pytest.mark.parametrize("form", NEAR, ids=str)
def test_two_grids_are_as_near_to_a_codebook_as_bfloat16_is_to_a_number(form):
    held = stored(form)
    weight = form.decode(held, SHAPE)
    # bfloat16 keeps 8 bits: half a step is 2^-9 of a number, and twice that is allowed
    assert apart(form.grids(held, SHAPE).weight, weight) < 2**-8


def test_the_codes_of_two_grids_are_the_nearest_sums():
    tables, (one, other) = two_grids(NF4_CODES)
    levels = torch.arange(-8, 8).double()
    sums = (one * levels[:, None] + other * levels).flatten()
    found = one * (tables[0].double() - 8) + other * (tables[1].double() - 8)
    wanted = torch.tensor(NF4_CODES).double()
    assert torch.equal((found - wanted).abs(), (sums - wanted[:, None]).abs().amin(1))
    assert tables.max() <= 15


@pytest.mark.parametrize("form", [*EXACT, *NEAR], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_multiplies_by_the_decoded_weight(form, tokens):
    held = stored(form)
    x = torch.randn(tokens, SHAPE[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = pack(form.grids(held, SHAPE))
    assert packed is not None
    wanted = x.double() @ form.decode(held, SHAPE).double().T
    # inputs are given in bfloat16; scales, offsets (and 1/s) are rounded to it, and so is the result: 2^-9 each, and
    # offsets of asymmetric grids are several times the weight they help to make
    assert apart(packed(x), wanted) < 0.02
    assert packed(x).dtype == torch.bfloat16


@pytest.mark.parametrize("form", NOT, ids=str)
def test_other_formats_have_no_such_form(form):
    assert form.grids(stored(form), SHAPE) is None


def test_sizes_the_kernel_does_not_take_are_left_to_decoding():
    form = compress.Uniform(bits=4, group=16)
    assert pack(form.grids(form.encode(torch.randn(16, 64)), (16, 64))) is None  # groups of 16
    form = compress.Uniform(bits=4, group=32)
    assert pack(form.grids(form.encode(torch.randn(10, 64)), (10, 64))) is None  # ten outputs
    assert NF4().grids(NF4().encode(torch.randn(16, 96)), (16, 96)) is None  # blocks across rows
    assert set(GROUPS) == {32, 64, 128, 256}


@pytest.mark.parametrize("form", [*EXACT[:3], *NEAR, *NOT[:4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_another_dtype_is_decoding_rounded_once(form, dtype):
    held = stored(form)
    assert torch.equal(form.decode_as(held, SHAPE, dtype), form.decode(held, SHAPE).to(dtype))


@pytest.mark.parametrize("shape", [(5, 7), (33, 70), (300, 257)])
def test_blocks_across_rows_and_pieces_decode_alike(shape):
    form = NF4(block=64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    held = form.encode(weight)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    book = torch.tensor(NF4_CODES)
    nearest = book[((blocks / scale)[..., None] - book).abs().argmin(-1)] * scale
    torch.testing.assert_close(
        form.decode(held, shape), nearest.flatten()[: weight.numel()].view(shape), rtol=0, atol=0
    )


def model(form):
    torch.manual_seed(0)
    net = llama(64, 2, 4, 128, vocab_size=96).build().eval()
    return compress.apply(net, form).bfloat16()


@pytest.mark.parametrize("form", [NF4(), compress.Uniform(bits=4, group=32)], ids=str)
def test_decoding_text_uses_packed_products_and_gives_the_models_outputs(form, monkeypatch):
    net, called = model(form), []
    call = Packed.__call__
    monkeypatch.setattr(Packed, "__call__", lambda self, x: called.append(len(x)) or call(self, x))
    tokens = torch.randint(96, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(tokens)
        with fast_linears(net):
            found = net(tokens)
        assert called
        assert apart(found, wanted) < 0.05  # two layers in bfloat16
        assert torch.equal(net(tokens), wanted)  # outside the context nothing is left of it
    called.clear()
    assert pw.generate(net, tokens, max_new_tokens=3, temperature=0.0).shape == (1, 3)
    assert 1 in called


def test_adapters_gradients_and_other_dtypes_take_the_usual_way(monkeypatch):
    monkeypatch.setattr(Packed, "__call__", lambda self, x: pytest.fail("packed"))
    net, tokens = model(NF4()), torch.randint(96, (1, 30))
    with fast_linears(net), torch.no_grad():
        net(tokens)  # more rows than the kernel is good for
    adapt.apply(net, adapt.LoRA(rank=2), "attention", dtype=torch.bfloat16)
    with fast_linears(net):
        net(tokens[:, :4]).sum().backward()
    with fast_linears(net.float()), torch.no_grad():
        net(tokens[:, :4])


def test_biases_are_added():
    weight, bias = torch.randn(32, 64), torch.randn(32)
    layer = CompressedLinear(compress.Uniform(bits=4, group=32), weight, bias).bfloat16()
    x = torch.randn(2, 64).bfloat16()
    holder = torch.nn.Sequential(layer)
    with torch.no_grad():
        wanted = holder(x)
        with fast_linears(holder):
            assert apart(holder(x), wanted) < 0.02
            assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


def test_codes_are_laid_out_once_a_layer_and_again_when_they_change(monkeypatch):
    made = []
    build = Packed.__init__
    monkeypatch.setattr(Packed, "__init__", lambda self, *given: made.append(1) or build(self, *given))
    holder = torch.nn.Sequential(CompressedLinear(NF4(), torch.randn(32, 64)).bfloat16())
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        for _ in range(3):
            with fast_linears(holder):
                holder(x)
        assert len(made) == 1
        other = torch.randn(32, 64)
        holder[0].encode_weight(other)
        with fast_linears(holder):
            found = holder(x)
    assert len(made) == 2
    assert apart(found, x.float() @ other.T) < 0.2  # four bits; the old weight would be off by more than 1
