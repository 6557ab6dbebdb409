"""Soft top-k masks: their equation and gradient, and that cutting leaves the masked model."""

import copy

import pytest
import torch
from torch import nn

from paperworks.compress.pruning.soft_topk import (
    SoftTopKMask,
    annealed,
    kept_units,
    mask_hidden_units,
    set_temperature,
    soft_top_k,
)
from paperworks.models import Block, Decoder, count_parameters
from paperworks.models.surgery.pruning import keep_hidden_units
from paperworks.nn import MLP, Attention, GatedMLP, RMSNorm, RoPE

TOKENS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def scores(count=9, seed=0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(feedforward=None, depth=2):
    torch.manual_seed(0)
    feedforward = feedforward or GatedMLP(hidden=24)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=feedforward)
    spec = Decoder(vocab_size=31, dim=16, depth=depth, norm=RMSNorm(), init_std=0.3, block=block)
    return spec.build().eval()


@pytest.mark.parametrize("k", [1, 4, 8, 9])
@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1, 1e-3])
def test_the_mask_sums_to_k_and_orders_as_the_scores_do(k, temperature):
    s = scores()
    mask = soft_top_k(s, k, temperature)
    assert float(mask.sum()) == pytest.approx(k, abs=1e-9)
    assert bool((mask >= 0).all() and (mask <= 1).all())
    assert bool((mask[s.argsort()].diff() >= -1e-12).all())


def test_the_mask_maximizes_scores_plus_entropy():
    s, k, temperature = scores(), 4, 0.7

    def value(mask):
        entropy = -(mask * mask.log() + (1 - mask) * (1 - mask).log()).sum()
        return float(mask @ s + temperature * entropy)

    best = soft_top_k(s, k, temperature)
    for seed in range(20):
        step = 1e-3 * scores(seed=seed + 1)
        assert value(best + step - step.mean()) < value(best)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_its_gradient_passes_through_the_threshold(temperature):
    s = scores().requires_grad_()
    torch.autograd.gradcheck(lambda s: soft_top_k(s, 4, temperature), (s,))
    mask = soft_top_k(s, 4, temperature)
    slope = (mask * (1 - mask) / temperature).detach()
    upstream = scores(seed=5)
    (found,) = torch.autograd.grad(mask @ upstream, s)
    expected = slope * (upstream - (slope @ upstream) / slope.sum())
    assert (found - expected).abs().max() < 1e-12


def test_at_temperature_zero_it_is_the_top_k():
    s = scores()
    hard = soft_top_k(s, 4, 0.0)
    assert hard.nonzero()[:, 0].tolist() == sorted(s.topk(4).indices.tolist())
    assert set(hard.tolist()) == {0.0, 1.0}
    assert (soft_top_k(s, 4, 1e-4) - hard).abs().max() < 1e-9
    assert (soft_top_k(torch.zeros(6), 3, 1.0) - 0.5).abs().max() < 1e-7


def test_the_temperature_falls_by_equal_factors_to_zero():
    assert [annealed(step, 4, 1.0, 0.01) for step in (0, 2, 4, 5)] == pytest.approx([1.0, 0.1, 0.0, 0.0])


@torch.no_grad()
@pytest.mark.parametrize(
    "feedforward", [GatedMLP(hidden=24), GatedMLP(hidden=24, bias=True), MLP(hidden=24), MLP(hidden=24, bias=False)]
)
def test_the_model_that_is_cut_equals_the_masked_one(feedforward):
    masked = model(feedforward)
    for parameter in masked.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    whole = masked(TOKENS)
    masks = mask_hidden_units(masked, keep=0.5)
    for mask in masks.values():
        mask.scores.normal_()
    soft = masked(TOKENS)
    set_temperature(masks, 0.0)
    smaller = keep_hidden_units(masked, kept_units(masks))
    assert (smaller(TOKENS) - masked(TOKENS)).abs().max() < 1e-5
    assert (soft - masked(TOKENS)).abs().max() > 1e-2  # not annealed, pruning is not exact
    assert (whole - masked(TOKENS)).abs().max() > 1e-2
    assert smaller.spec.blocks[0].feedforward.hidden == 12
    assert sum(p.numel() for p in smaller.parameters()) == count_parameters(smaller.spec)
    assert all(isinstance(module, SoftTopKMask) for module in masks.values())
    assert not any(isinstance(module, SoftTopKMask) for module in smaller.modules())


@torch.no_grad()
def test_the_units_with_the_highest_scores_stay_in_their_order():
    masked = model(depth=1)
    masks = mask_hidden_units(masked, keep=1 / 12)
    masks["blocks.0.feedforward.hidden"].scores[[17, 3]] = torch.tensor([2.0, 1.0])
    before = masked.blocks[0].feedforward
    after = keep_hidden_units(masked, kept_units(masks)).blocks[0].feedforward
    assert torch.equal(after.gate.weight, before.gate.weight[[3, 17]])
    assert torch.equal(after.up.weight, before.up.weight[[3, 17]])
    assert torch.equal(after.down.weight, before.down.weight[:, [3, 17]])


@torch.no_grad()
def test_layers_may_keep_different_numbers_of_units():
    whole = model()
    smaller = keep_hidden_units(whole, {"blocks.1.feedforward.hidden": torch.tensor([4, 2, 9])})
    assert [block.feedforward.hidden for block in smaller.spec.blocks] == [24, 3]
    off = whole.blocks[1].feedforward.down.weight
    off[:, [unit for unit in range(24) if unit not in (2, 4, 9)]] = 0
    assert (smaller(TOKENS) - whole(TOKENS)).abs().max() < 1e-5


def test_masks_alone_can_be_learned():
    masked = model().requires_grad_(False)
    masks = mask_hidden_units(masked, keep=0.25)
    masked(TOKENS).square().sum().backward()
    assert all(bool(mask.scores.grad.abs().sum() > 0) for mask in masks.values())
    assert [name for name, p in masked.named_parameters() if p.grad is not None] == [
        f"blocks.{layer}.feedforward.hidden.scores" for layer in range(2)
    ]


def test_other_modules_and_partly_masked_ones():
    block = nn.Sequential(GatedMLP(hidden=8).build(4), nn.Linear(4, 4))
    assert list(mask_hidden_units(block, keep=0.01)) == ["0.hidden"]
    assert block[0].hidden.k == 1
    alone = MLP(hidden=8).build(4)
    assert list(mask_hidden_units(alone)) == ["hidden"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="k must be from 1 to the 9 units, got 0"):
        soft_top_k(scores(), 0, 1.0)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        soft_top_k(scores(), 1, -1.0)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        mask_hidden_units(model(), keep=0)
    with pytest.raises(ValueError, match="Linear holds no MLP"):
        mask_hidden_units(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"blocks\.9\.feedforward\.hidden is no tap of hidden units"):
        keep_hidden_units(model(), {"blocks.9.feedforward.hidden": torch.tensor([0])})
    for units in ([], [0, 0], [24], [-1, 2]):
        with pytest.raises(ValueError, match="name one or more of the 24 units, each once"):
            keep_hidden_units(model(), {"blocks.0.feedforward.hidden": torch.tensor(units, dtype=torch.int64)})
    masked = model()
    mask_hidden_units(masked)
    with pytest.raises(ValueError, match=r"blocks\.0\.feedforward is masked already"):
        mask_hidden_units(masked)
    assert copy.deepcopy(masked)(TOKENS).shape == (2, 9, 31)
