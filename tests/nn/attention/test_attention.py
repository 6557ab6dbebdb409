import math

import pytest
import torch

from paperworks.interpret import record
from paperworks.nn import Attention, Placement, RMSNorm, RoPE
from paperworks.nn.recurrent.mamba import Mamba

CPU = torch.device("cpu")
DIM, TIME = 24, 7


def built(**fields):
    torch.manual_seed(0)
    module = Attention(**{"heads": 4} | fields).build(DIM).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # large enough that a wrong head shows
    return module


def outputs(module, x, **placement):
    return module(x, Placement(**placement).resolve(x.shape[0], x.shape[1], x.device))


def by_equation(module, x, spec):
    """softmax(q k^T scale) v for each head and query, one after the other."""
    size, kv_heads = module.head_dim, module.kv_heads
    out = torch.zeros(x.shape[0], x.shape[1], spec.heads * size, dtype=x.dtype)
    for row in range(x.shape[0]):
        q, k, v = (part(x[row]).view(x.shape[1], -1, size) for part in (module.query, module.key, module.value))
        if module.query_norm is not None:
            q, k = module.query_norm(q), module.key_norm(k)
        for head in range(spec.heads):
            shared = head * kv_heads // spec.heads
            for i in range(x.shape[1]):
                last = i + 1 if spec.causal else x.shape[1]
                first = 0 if spec.window is None else max(0, i - spec.window + 1)
                scores = torch.stack([q[i, head] @ k[j, shared] for j in range(first, last)]) * module.scale
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
                mixed = scores.softmax(0) @ v[first:last, shared]
                out[row, i, head * size : (head + 1) * size] = mixed
    return module.output(out)


KINDS = {
    "multi-head": {},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1},
    "both ways": {"causal": False},
    "a window": {"window": 3},
    "wide heads": {"head_dim": 10},
    "biases": {"bias": True},
    "normed heads": {"qk_norm": RMSNorm()},
    "soft cap": {"soft_cap": 2.0},
    "own scale": {"scale": 0.1},
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_its_equation(name):
    module = built(**KINDS[name])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    assert (outputs(module, x) - by_equation(module, x, module.spec)).abs().max() < 1e-12


@torch.no_grad()
def test_recording_the_pattern_changes_no_output_and_shows_rows_that_sum_to_one():
    module = built(kv_heads=2)
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    plain = outputs(module, x)
    with record(module, ["pattern", "heads"]) as seen:
        recorded = outputs(module, x)
    assert torch.equal(plain, recorded)
    assert seen["pattern"].shape == (2, 4, TIME, TIME)
    assert (seen["pattern"].sum(-1) - 1).abs().max() < 1e-12
    assert not seen["pattern"].triu(1).any()
    assert seen["heads"].shape == (2, TIME, 4, DIM // 4)


def test_dropout_is_for_training_only():
    module = built(dropout=0.5)
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    assert torch.equal(outputs(module, x), outputs(module, x))
    module.train()
    assert not torch.equal(outputs(module, x), outputs(module, x))


def test_a_cache_of_another_mixer_is_refused():
    module = built()
    other = Mamba().build(DIM).new_cache(1, 8, torch.float64, CPU)
    here = Placement().resolve(1, TIME, CPU).at(other)
    with pytest.raises(TypeError, match=r"AttentionModule was given a .*: use the model's new_cache"):
        module(torch.randn(1, TIME, DIM, dtype=torch.float64), here)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"kv_heads": 3}, r"kv_heads must divide heads \(4\), got 3; possible: \[1, 2, 4\]"),
        ({"window": 0}, "window must be at least 1"),
        ({"soft_cap": 0.0}, "soft_cap must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"head_dim": 5, "position": RoPE()}, "5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_with_the_value(fields, message):
    with pytest.raises(ValueError, match=message):
        Attention(**{"heads": 4} | fields).build(DIM)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"heads \(5\) must divide dim \(24\), or give head_dim"):
        Attention(heads=5).build(DIM)


def test_the_scale_is_one_over_the_root_of_the_heads_channels():
    assert built(head_dim=10).scale == pytest.approx(1 / math.sqrt(10))
