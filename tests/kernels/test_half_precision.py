import pytest
import torch
from torch.nn import functional as F

from paperworks.kernels import half_precision


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(half_precision, "has_native_products", lambda dtype: False)


def network(x, weight, key):
    mixed = F.scaled_dot_product_attention(x @ weight, key, key, is_causal=True)
    return F.linear(mixed, weight).square().sum()


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_float32_give_the_half_precision_numbers_and_gradients(dtype):
    x, key = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 8, 16)
    weight = torch.randn(16, 16) / 4
    results = []
    for wide in (False, True):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, key)]
        if wide:
            with half_precision.products_in_float32(dtype):
                out = network(*leaves)
                out.backward()
        else:
            out = network(*leaves)
            out.backward()
        assert out.dtype == dtype
        results.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in (x, weight, key)]
    loss = network(*exact)
    loss.backward()
    for plain, wide, true in zip(*results, [loss.detach(), *(leaf.grad for leaf in exact)], strict=True):
        scale = true.abs().max()
        # a few roundings to the dtype's 8 or 11 bits; and no further from the truth than torch's own products
        bound = 8 * torch.finfo(dtype).eps
        assert (wide - true).abs().max() / scale < bound
        assert (wide - true).norm() < 1.5 * (plain - true).norm() + 1e-6


@pytest.mark.usefixtures("without_instructions")
def test_float32_products_are_left_alone():
    a = torch.randn(5, 5)
    with half_precision.products_in_float32(torch.bfloat16):
        inside = a @ a
    assert torch.equal(inside, a @ a)


def test_float32_is_always_native():
    assert half_precision.has_native_products(torch.float32)
