"""The MLP and its gated variants: against their equations in float64, and against transformers' layers."""

import math

import pytest
import torch

from paperworks.nn import MLP, GatedMLP
from paperworks.nn.feedforward.mlp import gated_hidden

DIM, HIDDEN = 6, 10
SCALARS = {
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "identity": lambda z: z,
    "relu_squared": lambda z: max(z, 0.0) ** 2,
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module(spec, bias=0.5):
    built = spec.build(DIM).double()
    with torch.no_grad():
        for seed, parameter in enumerate(built.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) * (bias if parameter.dim() == 1 else 1))
    return built


def times(weight, x, bias=None):
    rows = weight.tolist()
    offsets = [0.0] * len(rows) if bias is None else bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, offsets, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", SCALARS)
def test_a_gated_mlp_is_its_equation_and_the_activation_is_on_the_gate(activation, bias):
    """FFN(x) = (act(x W + b) * (x V + c)) W2 + d, number by number."""
    ours, act = module(GatedMLP(hidden=HIDDEN, activation=activation, bias=bias)), SCALARS[activation]
    x = drawn(1, 3, DIM, seed=9)
    found = ours(x)[0]
    for token, row in enumerate(x[0].tolist()):
        gate, up = (times(part.weight, row, part.bias) for part in (ours.gate, ours.up))
        hidden = [act(g) * u for g, u in zip(gate, up, strict=True)]
        assert found[token].tolist() == pytest.approx(times(ours.down.weight, hidden, ours.down.bias), abs=1e-12)


@pytest.mark.parametrize("activation", SCALARS)
def test_an_mlp_is_its_equation(activation):
    ours, act = module(MLP(hidden=HIDDEN, activation=activation)), SCALARS[activation]
    x = drawn(1, 3, DIM, seed=9)
    found = ours(x)[0]
    for token, row in enumerate(x[0].tolist()):
        hidden = [act(z) for z in times(ours.up.weight, row, ours.up.bias)]
        assert found[token].tolist() == pytest.approx(times(ours.down.weight, hidden, ours.down.bias), abs=1e-12)


@pytest.mark.parametrize("activation", SCALARS)
def test_gradients_are_those_of_differences(activation):
    ours = module(GatedMLP(hidden=HIDDEN, activation=activation))
    x = drawn(1, 2, DIM, seed=9).requires_grad_()
    torch.autograd.gradcheck(
        lambda x, *weights: torch.func.functional_call(
            ours, dict(zip(("gate.weight", "up.weight", "down.weight"), weights, strict=True)), x
        ),
        (x, *(part.weight for part in (ours.gate, ours.up, ours.down))),
    )


@pytest.mark.parity
def test_swiglu_is_transformers_llama_mlp():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    ours = module(GatedMLP(hidden=HIDDEN, activation="silu"))
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_attention_heads=1, hidden_act="silu")
    ).double()
    names = {"gate_proj": ours.gate, "up_proj": ours.up, "down_proj": ours.down}
    _agree(ours, theirs, names)


@pytest.mark.parity
@pytest.mark.parametrize(("activation", "theirs_name"), [("gelu_tanh", "gelu_new"), ("relu", "relu"), ("silu", "silu")])
def test_geglu_is_transformers_gated_t5_layer(activation, theirs_name):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    ours = module(GatedMLP(hidden=HIDDEN, activation=activation))
    config = T5Config(d_model=DIM, d_ff=HIDDEN, dropout_rate=0.0)
    config.dense_act_fn = theirs_name
    theirs = T5DenseGatedActDense(config).double()
    _agree(ours, theirs, {"wi_0": ours.gate, "wi_1": ours.up, "wo": ours.down})


def _agree(ours, theirs, names):
    with torch.no_grad():
        for name, part in names.items():
            theirs.get_submodule(name).weight.copy_(part.weight)
    x, upstream = drawn(2, 3, DIM, seed=9), drawn(2, 3, DIM, seed=8)
    found, expected = ours(x), theirs(x)
    assert (found - expected).abs().max() < 1e-12
    found.backward(upstream)
    expected.backward(upstream)
    for name, part in names.items():
        assert (part.weight.grad - theirs.get_submodule(name).weight.grad).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("hidden", "multiple", "gated"), [(3072, 1, 2048), (16_384, 256, 11_008), (384, 1, 256), (1, 1, 1), (10, 4, 8)]
)
def test_two_thirds_of_the_width_keep_the_parameters(hidden, multiple, gated):
    """T5-base's 3072 and 2048 (Shazeer 2020, Section 3.1); LLaMA's 4 * 4096 and 11,008."""
    assert gated_hidden(hidden, multiple) == gated


def test_widths_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"GatedMLP\.hidden must be at least 1, got 0"):
        GatedMLP(hidden=0)
    with pytest.raises(ValueError, match=r"gated_hidden\.hidden must be at least 1, got 0"):
        gated_hidden(0)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        gated_hidden(10, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        GatedMLP(hidden=4, activation="swish")
