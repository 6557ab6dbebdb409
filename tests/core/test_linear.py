"""Linear-like layers: the registry, and weights that are computed when they are needed."""

import pytest
import torch
from torch import nn

from paperworks.core import linear
from paperworks.core.linear import (
    LazyWeight,
    features,
    is_linear_like,
    is_transposed,
    linear_kind,
    register_linear,
    stacked_weight,
    weight_of,
    write_weight,
)


class Reversed(nn.Module):
    """x @ weight, of a library we do not know."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(linear, "_FORMS", dict(linear._FORMS))


def test_a_registered_layer_is_read_and_written_the_right_way_round(registry):
    layer = Reversed(4, 6)
    assert not is_linear_like(layer)
    register_linear("Reversed", transposed=True)
    assert is_linear_like(layer)
    assert is_transposed(layer)
    assert features(layer) == (4, 6)
    x = torch.randn(3, 4)
    assert torch.allclose(x @ weight_of(layer).T, layer(x))
    write_weight(layer, torch.ones(6, 4))
    assert torch.equal(layer.weight, torch.ones(4, 6))
    with pytest.raises(ValueError, match="layers called Reversed are known already, as linear"):
        register_linear("Reversed")


def test_a_registered_layer_carries_adapters_and_formats(registry):
    from paperworks import adapt, compress

    register_linear("Reversed", transposed=True)
    model = nn.Sequential(Reversed(8, 6))
    x = torch.randn(3, 8)
    before = model(x)
    adapt.apply(model, adapt.DoRA(rank=2), "all-linear")
    assert torch.equal(model(x), before)
    assert model[0].weight.shape == (8, 6)
    compress.apply(adapt.remove(model), compress.Int8(), "all-linear")
    assert (model(x) - before).abs().max() < 0.05 * before.abs().max()  # eight bits


def test_kinds_that_named_sets_do_not_include():
    assert linear_kind(nn.Embedding(5, 3)) == "lookup"
    assert linear_kind(nn.Embedding(5, 3, max_norm=1.0)) is None
    assert linear_kind(nn.Conv2d(3, 8, 4, stride=4)) == "patches"
    assert features(nn.Conv2d(3, 8, 4, stride=4)) == (48, 8)
    for other in (nn.Conv2d(3, 8, 4), nn.Conv2d(4, 8, 2, 2, groups=2), nn.Conv2d(3, 8, 2, 2, padding=1), nn.ReLU()):
        assert linear_kind(other) is None
    assert not any(is_linear_like(layer) for layer in (nn.Embedding(5, 3), nn.Conv2d(3, 8, 4, stride=4)))


def test_stacks_are_read_as_experts_out_in():
    class Stack(nn.Module):
        def __init__(self, transposed):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))
            self.flat = nn.Parameter(torch.randn(4))
            self.is_transposed = transposed

    assert stacked_weight(Stack(False), "up").shape == (3, 4, 5)
    assert stacked_weight(Stack(True), "up").shape == (3, 5, 4)
    with pytest.raises(ValueError, match="flat of Stack is no stack of matrices"):
        stacked_weight(Stack(False), "flat")


def test_a_lazy_weight_is_computed_once_an_operation_needs_it():
    calls = []
    held = torch.randn(3, 4, requires_grad=True)

    def compute():
        calls.append(0)
        return 2 * held

    weight = LazyWeight.of((3, 4), torch.float32, torch.device("cpu"), compute, True)
    assert (weight.dtype, weight.device.type, weight.shape, weight.dim()) == (torch.float32, "cpu", (3, 4), 2)
    assert weight.requires_grad
    assert isinstance(weight, torch.Tensor)
    assert not calls
    x = torch.randn(2, 4)
    out = nn.functional.linear(x, weight)
    assert calls == [0]
    assert torch.equal(out, x @ (2 * held).T)
    out.sum().backward()
    assert torch.equal(held.grad, 2 * x.sum(0).expand(3, 4))
    assert type(weight.detach().clone()) is torch.Tensor
    assert torch.equal(torch.stack([weight, weight])[1], 2 * held)
