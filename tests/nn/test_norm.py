import pytest
import torch
from torch import nn

from paperworks.nn import LayerNorm, RMSNorm


def naive(x, gain, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.0625])
def test_rmsnorm_is_its_equation_in_float64_with_gradients(offset, fraction):
    norm = RMSNorm(eps=1e-5, offset=offset, fraction=fraction).build(32).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    used = x[..., : 2 if fraction < 1 else 32]
    expected = x / torch.sqrt(used.pow(2).mean(-1, keepdim=True) + 1e-5) * (norm.weight + offset)
    assert (norm(x) - expected).abs().max() < 1e-12
    torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_equal_transformers_bit_for_bit_in_half_precision(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for theirs, ours in ((LlamaRMSNorm(64, eps=1e-6), RMSNorm()), (GemmaRMSNorm(64, eps=1e-6), RMSNorm(offset=True))):
        ours = ours.build(64)
        with torch.no_grad():
            theirs.weight.normal_()
            ours.weight.copy_(theirs.weight)
        x = (10 * torch.randn(4, 64)).to(dtype)
        difference = (ours.to(dtype)(x) - theirs.to(dtype)(x)).abs().max()
        assert difference <= (2e-6 if dtype == torch.float32 else 0.0)


def test_rmsnorm_ignores_the_scale_of_its_input_but_not_its_mean():
    norm = RMSNorm(eps=0.0).build(16).double()
    x = torch.randn(4, 16, dtype=torch.float64)
    assert (norm(1000 * x) - norm(x)).abs().max() < 1e-12
    assert (norm(x + 1) - norm(x)).abs().max() > 0.1


def test_rmsnorm_equals_layernorm_on_centred_input():
    x = torch.randn(4, 16, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    one, other = RMSNorm(eps=1e-5).build(16).double(), LayerNorm(eps=1e-5, bias=False).build(16).double()
    assert (one(x) - other(x)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_inputs_do_not_overflow(dtype):
    x = torch.full((2, 4096), 300.0, dtype=dtype)  # 300^2 is beyond float16's 65,504
    for spec in (RMSNorm(), RMSNorm(offset=True), RMSNorm(fraction=0.5)):
        out = spec.build(4096).to(dtype)(x)
        assert out.dtype == dtype
        assert (out.float() - 1).abs().max() < 1e-2


def test_gain_starts_at_one_in_both_forms():
    x = torch.randn(2, 8)
    assert torch.equal(RMSNorm().build(8)(x), RMSNorm(offset=True).build(8)(x))
