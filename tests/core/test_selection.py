import pytest
import torch
from torch import nn

from paperworks.core.linear import features, is_linear_like, weight_of, write_weight
from paperworks.core.selection import braces, grouped
from paperworks.models import preset
from paperworks.nn import select, select_linears
from tests.parity.families import oracle


@pytest.fixture(scope="module")
def llama():
    with torch.device("meta"):
        return preset("smollm2-135m").build()


def test_braces_expand():
    assert braces("a.{b,c}.d") == ["a.b.d", "a.c.d"]
    assert braces("{a,b{c,d}}") == ["a", "bc", "bd"]
    with pytest.raises(ValueError, match="never closed"):
        braces("a.{b,c")


def test_patterns_choose_by_path(llama):
    assert len(select_linears(llama, "blocks.*.mixer.{query,value}")) == 60
    assert list(select_linears(llama, ["blocks.3.feedforward.up", "blocks.1.mixer.key"])) == [
        "blocks.1.mixer.key",
        "blocks.3.feedforward.up",
    ]


def test_named_sets_leave_the_readout_alone(llama):
    assert len(select_linears(llama, "attention")) == 120
    assert len(select_linears(llama, "feedforward")) == 90
    assert len(select_linears(llama, "all-linear")) == 210


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "attention", "feedforward"),
    [("llama2", 12, 9), ("gpt2", 6, 6), ("pythia", 6, 6), ("phi3", 6, 6), ("gemma2", 16, 12)],
)
def test_named_sets_know_other_libraries_layers(family, attention, feedforward):
    model = oracle(family)
    assert len(select_linears(model, "attention")) == attention
    assert len(select_linears(model, "feedforward")) == feedforward
    assert len(select_linears(model, "all-linear")) == attention + feedforward


def test_nothing_matched_lists_near_misses(llama):
    with pytest.raises(ValueError, match=r"'blocks.\*.mixer.qeury' matches no linear layer.*blocks.\*.mixer.query"):
        select_linears(llama, "blocks.*.mixer.qeury")
    with pytest.raises(ValueError, match="none is a linear layer"):
        select_linears(llama, "blocks.*.mixer_norm")


def test_misses_name_the_named_sets_and_wrong_targets_are_refused(llama):
    with pytest.raises(
        ValueError, match=r"'mlp' matches no linear layer.*Named sets: attention, feedforward, all-linear"
    ):
        select_linears(llama, "mlp")
    with pytest.raises(ValueError, match=r"targets must be a pattern, .* got int 3"):
        select_linears(llama, 3)
    with pytest.raises(ValueError, match=r"the model comes first: expected a torch.* got str 'attention'"):
        select_linears("attention", llama)


def test_paths_are_grouped_by_their_numbers():
    assert grouped(["0.up", "1.up", "blocks.3.down", "norm"]) == [("*.up", 2), ("blocks.*.down", 1), ("norm", 1)]


def test_transposed_linears_are_read_and_written_the_right_way_round():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)  # 6 out, 4 in
    assert is_linear_like(layer)
    assert features(layer) == (4, 6)
    x = torch.randn(3, 4)
    assert torch.allclose(x @ weight_of(layer).T + layer.bias, layer(x), atol=1e-6)
    write_weight(layer, torch.ones(6, 4))
    assert torch.equal(layer.weight, torch.ones(4, 6))


def test_what_is_not_linear_is_refused():
    with pytest.raises(TypeError, match="ReLU is not linear-like"):
        weight_of(nn.ReLU())
    assert not is_linear_like(nn.Conv1d(2, 2, 1))
    assert select(nn.Sequential(nn.ReLU()), "0")
