"""The activation buffer, on models of ours and of others."""

import pytest
import torch
from torch import nn

from paperworks import interpret
from paperworks.interpret import sae
from paperworks.models.presets.families import llama


class Counting(nn.Module):
    """Gives each token its own recognizable vector, and counts how far its forward passes went."""

    def __init__(self, dim=3):
        super().__init__()
        self.embed = nn.Embedding(10_000, dim)
        self.after = nn.Linear(dim, dim)
        self.reached_the_end = 0
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(10_000.0)[:, None].expand(-1, dim))

    def forward(self, tokens):
        hidden = self.after(self.embed(tokens))
        self.reached_the_end += 1
        return hidden


def contexts(count=20, length=11):
    return list(torch.arange(count * length).view(count, 1, length))


def test_every_position_but_the_first_comes_exactly_once_and_shuffled_across_contexts():
    model = Counting()
    buffer = sae.Activations(model, "embed", contexts(), size=10, capacity=60)
    batches = list(buffer)
    assert all(batch.shape == (10, 3) for batch in batches)
    seen = torch.cat(batches)[:, 0].long()
    wanted = torch.cat(contexts())[:, 1:].flatten()
    assert torch.equal(seen.sort().values, wanted)  # 200 rows, a multiple of the batch
    assert (torch.diff(seen) != 1).float().mean() > 0.9
    assert max(len((batch[:, 0] // 11).unique()) for batch in batches) >= 4  # several contexts in one batch
    assert model.reached_the_end == 0  # the model stops at the tap
    assert not model.embed._forward_hooks
    again = torch.cat(list(buffer))[:, 0].long()
    assert torch.equal(seen, again)  # the same seed, the same order
    other = sae.Activations(model, "embed", contexts(), size=10, capacity=60, seed=1)
    assert not torch.equal(torch.cat(list(other))[:, 0].long(), seen)


def test_memory_is_bounded_by_the_capacity():
    buffer = sae.Activations(Counting(), "embed", contexts(200), size=10, capacity=60)
    late = [int(batch[:, 0].max()) // 11 for batch in buffer]
    for index, newest in enumerate(late):  # nothing newer than what was drawn before plus one full buffer
        assert newest <= (index * 10 + 60) // 10 + 1


def test_padding_and_several_shapes_of_input_are_understood():
    model = Counting()
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    keep = sae.Activations(model, "embed", [tokens], size=1, capacity=8, keep=lambda batch: batch != 0)
    assert sorted(torch.cat(list(keep))[:, 0].tolist()) == [2, 3, 5]
    for batch in ({"tokens": tokens}, (tokens,)):
        rows = torch.cat(list(sae.Activations(model, "embed", [batch], size=1, capacity=8)))
        assert len(rows) == 6


def test_rows_far_longer_than_others_can_be_left_out():
    model = Counting()
    with torch.no_grad():
        model.embed.weight.copy_(torch.ones(10_000, 3))
        model.embed.weight[[5, 17]] = 1e4
    plain = sae.Activations(model, "embed", contexts(), factor=2.0)
    assert plain.median_length() == pytest.approx(3**0.5)
    buffer = sae.Activations(model, "embed", contexts(), longest=5 * plain.median_length())
    rows = torch.cat(list(buffer.rows()))
    assert len(rows) == 198
    assert (rows == 1).all()
    assert plain.mean_square() > 1e6 * buffer.mean_square()


def test_our_models_and_record_agree():
    torch.manual_seed(0)
    model = llama(16, 3, 4, 44, kv_heads=2, vocab_size=50).build().eval()
    tokens = torch.arange(12).view(2, 6)
    buffer = sae.Activations(model, "blocks.1", [tokens], size=1, capacity=16)
    with interpret.record(model, "blocks.1") as seen, torch.no_grad():
        model(tokens)
    rows = torch.cat(list(buffer.rows()))
    assert torch.equal(rows, seen["blocks.1"][:, 1:].flatten(0, 1))
    scaled = buffer.normalized(16.0)
    assert torch.cat(list(scaled.rows())).square().sum(dim=1).mean().item() == pytest.approx(16.0, rel=1e-5)
    assert scaled.gather(7).shape == (7, 16)
    assert buffer.factor == 1.0


def test_bad_buffers_are_refused():
    model = Counting()
    with pytest.raises(ValueError, match="matches no module"):
        sae.Activations(model, "embd", contexts())
    with pytest.raises(ValueError, match="reads one tap, '\\*' matches 2"):
        sae.Activations(model, "*", contexts())
    with pytest.raises(ValueError, match="capacity must hold two batches"):
        sae.Activations(model, "embed", contexts(), size=100, capacity=150)
    with pytest.raises(ValueError, match="leave_out_first is -1"):
        sae.Activations(model, "embed", contexts(), leave_out_first=-1)
    with pytest.raises(ValueError, match="fewer than the 512 rows of one batch"):
        sae.Activations(model, "embed", contexts()).gather(512)
    flat = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 gives shape \(4, 3\); \(batch, time, dim\) is needed"):
        list(sae.Activations(flat, "0", [torch.zeros(4, 3)]))
    assert len(list(sae.Activations(flat, "0", [torch.zeros(4, 3)], leave_out_first=0, size=2))) == 2
    with pytest.raises(ValueError, match="only zeros: there is no scale"):
        sae.Activations(nn.Sequential(nn.Identity()), "0", [torch.zeros(1, 4, 3)]).normalized(3.0)
    with pytest.raises(ValueError, match=r"keep\(batch 0\) gave torch.int64"):
        list(sae.Activations(model, "embed", contexts(), keep=lambda batch: batch))


def test_values_that_are_not_finite_are_named_with_tap_and_batch():
    model = Counting()
    with torch.no_grad():
        model.embed.weight[35] = torch.nan
    with pytest.raises(ValueError, match=r"of embed hold NaN or infinity in batch 3 \(counted from 0\), row 1 of 10"):
        list(sae.Activations(model, "embed", contexts(), size=10, capacity=60))


def test_a_tap_that_changes_size_or_does_not_run_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.tap, self.idle = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.tap(x)

    batches = [torch.ones(1, 4, 3), torch.ones(1, 4, 5)]
    with pytest.raises(ValueError, match="vectors of size 3, and of size 5 in batch 1"):
        list(sae.Activations(Odd(), "tap", batches, size=2, capacity=4))
    with pytest.raises(ValueError, match="not through idle"):
        list(sae.Activations(Odd(), "idle", batches))


def test_planted_data_has_the_scale_rate_and_directions_it_states():
    data = sae.Planted(mean_square=64.0)
    x = data.draw(100_000, torch.Generator().manual_seed(0))
    assert data.mean_square() == pytest.approx(64.0)
    # ||x||^2 spreads by some 40: five standard errors of the mean of 100,000
    assert x.square().sum(dim=1).mean().item() == pytest.approx(64.0, abs=0.7)
    coefficients = data.coefficients(20_000, torch.Generator().manual_seed(0))
    on = coefficients > 0
    assert on.sum(dim=1).float().mean().item() == pytest.approx(5.0, abs=0.08)
    values = coefficients[on] / data.factor
    assert values.min() >= 0.5
    assert values.max() <= 1.5
    assert torch.allclose(data.directions.norm(dim=1), torch.ones(256), atol=1e-6)
    assert torch.equal(next(data.batches(8, 1, seed=3)), next(data.batches(8, 1, seed=3)))
    torch.manual_seed(0)
    fresh = sae.TopK(latents=256, k=5).build(64)  # the same seed must not give the answer away
    assert sae.recovery(data.directions, fresh).mmcs < 0.45
    for bad in ({"rate": 0.0}, {"low": 2.0}, {"mean_square": -1.0}):
        with pytest.raises(ValueError, match=r"got|is -1"):
            sae.Planted(**bad)
