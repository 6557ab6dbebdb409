"""Tiled attention is attention: in float64, with gradients, for any tiles; and counts what the paper counts."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from paperworks.nn.attention.reference.tiled import Partial, Tiles, Traffic, merge, standard_traffic, tiled_attention


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(queries=13, keys=17, dim=8):
    return [drawn(2, 3, length, dim, seed=seed).requires_grad_() for seed, length in enumerate((queries, keys, keys))]


def plain(query, key, value, causal=False, mask=None):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[-2] - query.shape[-2])
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tiles", [Tiles(1, 1), Tiles(4, 5), Tiles(13, 17), Tiles(64, 3)])
def test_any_tiles_give_attention_and_its_gradients(causal, tiles):
    ours, theirs = inputs(), inputs()
    found, log_sum = tiled_attention(*ours, causal=causal, tiles=tiles)
    expected, expected_sum = plain(*theirs, causal=causal)
    assert (found - expected).abs().max() < 1e-14
    assert (log_sum - expected_sum).abs().max() < 1e-13
    upstream = drawn(*found.shape, seed=9)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-13


@pytest.mark.parity
def test_it_is_torchs_fused_attention():
    query, key, value = (tensor.detach() for tensor in inputs(17, 17))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (tiled_attention(query, key, value, causal=True)[0] - expected).abs().max() < 1e-14
    expected = functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    assert (tiled_attention(query, key, value, scale=0.3)[0] - expected).abs().max() < 1e-14


def test_gradients_are_the_derivatives():
    def run(*given):
        return tiled_attention(*given, causal=True, tiles=Tiles(2, 3))[0]

    torch.autograd.gradcheck(run, tuple(tensor[:1, :1].detach().requires_grad_() for tensor in inputs(4, 5, 3)))


def test_a_query_that_sees_nothing_gets_zeros():
    ours = inputs(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, :4] = False
    found, log_sum = tiled_attention(*ours, mask=mask, tiles=Tiles(2, 2))
    found.sum().backward()
    assert torch.equal(found[..., 1, :], torch.zeros(2, 3, 8, dtype=torch.float64))
    assert (log_sum[..., 1] == -math.inf).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in ours)
    rows = [0, 2, 3]
    expected = plain(ours[0][..., rows, :], ours[1], ours[2], mask=mask[rows])[0]
    assert (found[..., rows, :] - expected).abs().max() < 1e-14


def test_scores_of_ten_thousand_stay_finite():
    query, key, value = (tensor.detach().float() for tensor in inputs())
    found, _ = tiled_attention(1e4 * query, key, value)
    assert torch.isfinite(found).all()
    assert not torch.isfinite(torch.exp(1e4 * query @ key.transpose(-1, -2))).all()


@torch.no_grad()
def test_traffic_follows_the_papers_formula():
    """Theorem 2: N^2 d^2 / M numbers, as long as d <= M <= N d; a fourth of the memory costs four times the traffic."""
    moved = {}
    query, key, value = (torch.zeros(256, 16) for _ in range(3))
    for memory in (256, 1024):
        traffic = Traffic()
        tiled_attention(query, key, value, tiles=Tiles.fitting(memory, 16), traffic=traffic)
        moved[memory] = traffic.total
        tiles = math.ceil(256 / Tiles.fitting(memory, 16).keys)
        # K and V once; for each tile of keys all of Q and O, the statistics twice, read, and O and they, written
        assert traffic.total == 2 * 256 * 16 + tiles * (256 * (2 * 16 + 2) + 256 * (16 + 2))
    assert 3.5 < moved[256] / moved[1024] < 4.5
    assert moved[1024] < standard_traffic(256, 256, 16)


@torch.no_grad()
def test_causal_tiles_that_nobody_sees_are_not_loaded():
    query, key, value = (torch.zeros(256, 16) for _ in range(3))
    whole, half = Traffic(), Traffic()
    tiled_attention(query, key, value, tiles=Tiles(16, 16), traffic=whole)
    tiled_attention(query, key, value, tiles=Tiles(16, 16), traffic=half, causal=True)
    assert 0.5 < half.total / whole.total < 0.6


def test_merging_is_associative_commutative_and_has_an_identity():
    query, key, value = (tensor.detach() for tensor in inputs())
    parts = [
        Partial(*tiled_attention(query, key[..., part, :], value[..., part, :]))
        for part in (slice(0, 5), slice(5, 6), slice(6, 17))
    ]
    nothing = Partial(torch.zeros_like(parts[0].out), torch.full_like(parts[0].log_sum, -math.inf))
    whole, log_sum = plain(query, key, value)
    for one, two, three in itertools.permutations(parts):
        for merged in (merge(merge(one, two), three), merge(one, merge(two, three))):
            assert (merged.out - whole).abs().max() < 1e-13
            assert (merged.log_sum - log_sum).abs().max() < 1e-13
    for merged in (merge(parts[0], nothing), merge(nothing, parts[0])):
        assert torch.equal(merged.out, parts[0].out)
    both = merge(nothing, nothing)
    assert torch.equal(both.out, nothing.out)
    assert (both.log_sum == -math.inf).all()


def test_what_does_not_fit_says_so():
    query, key, value = inputs()
    with pytest.raises(ValueError, match="do not fit: heads and dim must be equal"):
        tiled_attention(query, key[..., :4], value)
    with pytest.raises(ValueError, match=r"mask \(2, 2\) is not queries x keys \(13 x 17\)"):
        tiled_attention(query, key, value, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="4 x 16 are needed"):
        Tiles.fitting(63, 16)
    with pytest.raises(ValueError, match="at least one row of each"):
        Tiles(0, 4)
