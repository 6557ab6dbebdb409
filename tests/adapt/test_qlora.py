"""LoRA over NF4 with double quantization: what only the two together must keep."""

import pytest
import torch
from torch import nn

from paperworks import adapt, compress

FORMAT = compress.NF4(double_quantization=True)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.Tanh(), nn.Linear(64, 96, bias=False)).to(dtype)


def adapted(model, dtype=None):
    torch.manual_seed(1)
    adapt.apply(model, adapt.LoRA(rank=4, alpha=8), "*", dtype=dtype)
    for layer in adapt.adapted(model).values():
        nn.init.normal_(layer.delta.up, std=0.1)
    return model


def gradients(model, x):
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def test_outputs_and_gradients_are_those_of_the_decoded_weight():
    packed = compress.apply(network(), FORMAT, "*")
    plain = compress.decompress(compress.apply(network(), FORMAT, "*"))
    x = torch.randn(5, 128)
    assert torch.equal(packed(x), plain(x))
    for mine, other in zip(gradients(adapted(packed), x), gradients(adapted(plain), x), strict=True):
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
    assert all(parameter.grad is None for parameter in packed.parameters() if not parameter.requires_grad)


def test_no_decoded_weight_is_kept_for_the_backward_pass():
    packed = adapted(compress.apply(network(), FORMAT, "*"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda t: t):
        out = packed(torch.randn(5, 128))
    assert kept
    assert max(kept) < 64 * 96  # the smaller weight; adapters and activations have at most 5 x 128 or 4 x 128
    out.sum().backward()


def test_adapters_in_bfloat16_train_over_a_bfloat16_model():
    packed = adapted(compress.apply(network(torch.bfloat16), FORMAT, "*"), torch.bfloat16)
    out = packed(torch.randn(5, 128, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in packed.parameters() if p.requires_grad} == {torch.bfloat16}
    assert packed[0].base.codes.dtype == torch.uint8


def test_merging_says_when_four_bits_would_round_the_adapter_away():
    packed = adapted(compress.apply(network(), FORMAT, "*"))
    for layer in adapt.adapted(packed).values():
        layer.delta.up.data *= 1e-3
    with pytest.raises(ValueError, match="on 2 of 2 layers"):
        adapt.merge(packed)
    assert min(adapt.merge_error(packed).values()) > 1


@pytest.mark.parity
def test_outputs_and_gradients_equal_pefts_over_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    plain = network()
    theirs = nn.Sequential(*(nn.Identity() for _ in plain))
    for index in (0, 2):
        layer = bitsandbytes.nn.Linear4bit(
            plain[index].in_features,
            plain[index].out_features,
            bias=False,
            compute_dtype=torch.float32,
            compress_statistics=True,
            quant_type="nf4",
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            plain[index].weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        theirs[index] = layer.to("cpu")
    theirs[1] = nn.Tanh()
    ours = adapted(compress.apply(plain, FORMAT, "*"))
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    wrapped = [module for module in peft.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    for twin, layer in zip(wrapped, adapt.adapted(ours).values(), strict=True):
        twin.lora_A["default"].weight.data.copy_(layer.delta.down.data)
        twin.lora_B["default"].weight.data.copy_(layer.delta.up.data)
    x = torch.randn(5, 128)
    one, other = ours(x), peft(x)
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()  # float32 products, the decoded weights are equal
    for mine, grad in zip(gradients(ours, x), gradients(peft, x), strict=True):
        assert (mine - grad).abs().max() <= 1e-4 * grad.abs().max()
