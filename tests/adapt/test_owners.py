"""Wrapped layers keep their owner's contract: modules that read `.weight`, `.bias` or `.dtype` work as before."""

import copy

import pytest
import torch
import transformers
from torch import nn

from paperworks import adapt, compress
from paperworks.core.linear import LazyWeight


def shaken(model):
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))
    return model


def t5(dtype=torch.float32, gated=True):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu", dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).to(dtype).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


WRAPS = {
    "LoRA": lambda model: shaken(adapt.apply(model, adapt.LoRA(rank=2), "all-linear")),
    "DoRA": lambda model: shaken(adapt.apply(model, adapt.DoRA(rank=2), "all-linear")),
    "IA3": lambda model: shaken(adapt.apply(model, adapt.IA3(), "all-linear")),
    "Int8": lambda model: compress.apply(model, compress.Int8(), "all-linear"),
    "LoRA on NF4": lambda model: shaken(
        adapt.apply(compress.apply(model, compress.NF4(block=16), "all-linear"), adapt.LoRA(rank=2), "all-linear")
    ),
}
plain_of = {
    "Int8": lambda model: compress.decompress(copy.deepcopy(model)),
    "LoRA on NF4": lambda model: adapt.merge(compress_free(copy.deepcopy(model))),
}


def compress_free(model):
    return compress.decompress(model)


def decoded(wrap, model):
    """The same numbers in plain layers."""
    return plain_of.get(wrap, lambda model: adapt.merge(copy.deepcopy(model)))(model)


@pytest.mark.filterwarnings("ignore::paperworks.core.coverage.CoverageWarning")
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["t5", "encoder"])
def test_owners_that_read_weights_give_the_numbers_of_plain_layers(wrap, kind):
    model = WRAPS[wrap](t5() if kind == "t5" else encoder().eval())
    plain = decoded(wrap, model)
    assert not any(isinstance(module, adapt.AdaptedLinear | compress.CompressedLinear) for module in plain.modules())
    tokens, x = torch.randint(1, 97, (2, 6)), torch.randn(2, 6, 32)

    def run(each):
        return each(input_ids=tokens, labels=tokens).logits if kind == "t5" else each(x)

    for train in (False, True):
        for grad in (False, True):
            model.train(train), plain.train(train)
            with torch.set_grad_enabled(grad):
                one, other = run(model), run(plain)
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()  # float32
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and wrap != "Int8":
        model.eval()
        run(model).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_a_half_precision_t5_is_generated_from_and_keeps_its_dtype():
    model = shaken(adapt.apply(t5(torch.bfloat16), adapt.LoRA(rank=2), "all-linear"))
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    assert model.generate(torch.randint(1, 97, (1, 5)), max_new_tokens=3).shape[1] <= 4


@pytest.mark.filterwarnings("ignore::paperworks.core.coverage.CoverageWarning")
@pytest.mark.parametrize("method", [adapt.LoRA(rank=2), adapt.DoRA(rank=2), adapt.IA3(), adapt.PiSSA(rank=2)])
def test_multihead_attention_is_adapted_though_it_never_calls_its_projection(method):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    before = model(x, x, x)[0].detach()
    adapt.apply(model, method, "out_proj")
    assert (model(x, x, x)[0] - before).abs().max() < 1e-5
    shaken(model)
    merged = adapt.merge(copy.deepcopy(model))
    for train in (True, False):
        model.train(train), merged.train(train)
        out = model(x, x, x)[0]
        assert (out - before).abs().max() > 1e-2
        assert (out - merged(x, x, x)[0]).abs().max() < 1e-5
        model.zero_grad()
        out.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_what_cannot_act_in_multihead_attention_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: torch's MultiheadAttention reads this layer's weight"):
        adapt.apply(model, adapt.LoRA(rank=2, dropout=0.1), "*out_proj")
    assert not adapt.adapted(model)
    adapt.apply(model, adapt.LoRA(rank=2), "*out_proj")
    refused = pytest.raises(ValueError, match="the owner of this one reads its weight")
    with refused, adapt.per_row(model, ["default", None]):
        model(torch.randn(2, 6, 32))


def test_a_wrapper_reads_as_the_layer_it_wraps():
    base = nn.Linear(6, 4)
    weight, bias, keys = base.weight, base.bias, set(base.state_dict())
    model = nn.Sequential(base)
    adapt.apply(model, adapt.LoRA(rank=2), "0")
    layer = shaken(model)[0]
    assert isinstance(layer.weight, LazyWeight)
    assert (layer.weight.shape, layer.dtype, layer.device) == (weight.shape, weight.dtype, weight.device)
    assert torch.equal(layer.weight.detach(), weight + layer.delta.weight())
    assert layer.bias is bias
    with adapt.disabled(model):
        assert layer.weight is weight
    assert adapt.use(model, None)[0].weight is weight
    own = {key for key in layer.state_dict() if not key.startswith("deltas.")}
    assert own == {f"base.{key}" for key in keys}
    with pytest.raises(ValueError, match="merge or remove its adapters"):
        layer.encode_weight(weight)
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_a_compressed_layer_reads_as_the_layer_it_stands_for():
    base = nn.Linear(64, 4).to(torch.bfloat16)
    model = compress.apply(nn.Sequential(base), "int8", "0")
    layer = model[0]
    assert (layer.weight.shape, layer.weight.dtype, layer.dtype) == ((4, 64), torch.bfloat16, torch.bfloat16)
    assert torch.equal(layer.weight.clone(), layer.decoded_weight())
    assert layer.device == base.weight.device
    assert not any(key == "weight" for key in layer.state_dict())


def test_conv1d_keeps_its_own_layout():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4))
    shaken(adapt.apply(model, adapt.LoRA(rank=2), "0"))
    x = torch.randn(3, 4)
    assert model[0].nf == 6
    assert (torch.addmm(model[0].bias, x, model[0].weight) - model(x)).abs().max() < 1e-5
