from itertools import pairwise

import pytest
import torch
from torch import nn

from paperworks.compress.calibration.ldlq import proxy_loss
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.calibration.tuning import tune_block
from paperworks.compress.formats.additive_codes import (
    beam_search,
    cluster,
    k_means,
    nearest_entry,
    reconstruct,
    search_apart,
    tune_values,
)
from paperworks.compress.formats.aqlm import AQLM
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.formats.quip_sharp import QuIPSharp
from paperworks.compress.linear import CompressedLinear
from tests.compress.formats.test_quip import correlated, normal, statistics

SMALL = AQLM(codebooks=2, bits=4, group=4, epochs=3, steps=10)


def random_state(rows=6, groups=5, entries=8, size=4, count=2):
    draws = torch.Generator().manual_seed(2)
    books = torch.randn(count, entries, size, generator=draws, dtype=torch.float64)
    codes = torch.randint(entries, (rows, groups, count), generator=draws)
    scales = 0.5 + torch.rand(rows, generator=draws, dtype=torch.float64)
    return books, codes, scales


def loss_of(weight, moment, books, scales, codes):
    return float(proxy_loss(reconstruct(codes, books, scales) - weight, moment))


def test_bits_are_the_papers_and_codebooks_count():
    """Catalogue: 2x8 and 1x16 on 4096 x 4096."""
    assert abs(AQLM().bits_per_weight((4096, 4096)) - (2 + 2 * 16 * 256 * 8 / 4096**2 + 16 / 4096)) < 1e-12
    assert round(AQLM().bits_per_weight((4096, 4096)), 4) == 2.0078
    assert round(AQLM(codebooks=1, bits=16).bits_per_weight((4096, 4096)), 4) == 2.5039
    assert AQLM().bits_per_weight((192, 576)) > 2.5  # a small matrix pays for its codebooks


@pytest.mark.parametrize("form", [SMALL, AQLM(codebooks=3, bits=3, group=8, epochs=1, steps=2),
                                  AQLM(codebooks=1, bits=9, group=4, epochs=1, steps=2)], ids=str)  # fmt: skip
def test_bits_are_those_stored_and_decoding_is_the_sum_of_rows(form):
    weight, shape = normal(6, 24).float(), (6, 24)
    stored = form.encode(weight, statistics(correlated(24)))
    assert form.bits_per_weight(shape) == 8 * sum(t.nbytes for t in stored.values()) / 144
    codes = form.unpack(stored["codes"], shape)
    expected = torch.zeros(shape)
    for row in range(6):
        for group in range(24 // form.group):
            for book in range(form.codebooks):
                entry = stored["codebooks"][book, codes[row, group, book]].float()
                expected[row, group * form.group : (group + 1) * form.group] += entry * stored["scales"][row].float()
    assert (form.decode(stored, shape) - expected).abs().max() < 1e-5


def test_codes_of_sixteen_bits_survive_their_storage():
    form = AQLM(codebooks=1, bits=16, group=2)
    codes = torch.tensor([[[0], [32_767], [32_768], [65_535]]])
    assert torch.equal(form.unpack(form.pack(codes), (1, 8)), codes.int())


def test_one_beam_step_finds_the_best_replacement_in_turn():
    """Each code in turn is the best of all entries, tried one by one in float64."""
    books, codes, scales = random_state()
    weight, moment = normal(6, 20), correlated(20)
    expected = codes.clone()
    for row in range(6):
        for group in range(5):
            for book in range(2):
                found = []
                for entry in range(8):
                    trial = expected.clone()
                    trial[row, group, book] = entry
                    found.append(
                        loss_of(weight[row : row + 1], moment, books, scales[row : row + 1], trial[row : row + 1])
                    )
                expected[row, group, book] = int(torch.tensor(found).argmin())
    assert torch.equal(beam_search(weight, moment, books, scales, codes), expected)


def test_beam_search_never_raises_the_loss_and_a_wide_beam_finds_the_optimum():
    books, codes, scales = random_state(rows=12)
    weight, moment = normal(12, 20), correlated(20)
    losses = [loss_of(weight, moment, books, scales, codes)]
    for _ in range(3):
        codes = beam_search(weight, moment, books, scales, codes)
        losses.append(loss_of(weight, moment, books, scales, codes))
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    start = random_state(rows=12)[1]
    one = loss_of(weight, moment, books, scales, beam_search(weight, moment, books, scales, start))
    wide = loss_of(weight, moment, books, scales, beam_search(weight, moment, books, scales, start, beam=8))
    assert wide < one < losses[0]
    # one group, beam as wide as all pairs of codes: nothing is better than the best pair
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))[:, None]
    sums = reconstruct(pairs, books, torch.ones(64, dtype=torch.float64))
    errors = sums * scales[0] - weight[0, :4]
    best = ((errors @ moment[:4, :4]) * errors).sum(1).min()
    found = beam_search(weight[:1, :4], moment[:4, :4], books, scales[:1], start[:1, :1], beam=64)
    assert abs(loss_of(weight[:1, :4], moment[:4, :4], books, scales[:1], found) - float(best)) < 1e-9


def test_gradients_of_the_values_are_those_of_autograd():
    books, codes, scales = random_state()
    weight, moment = normal(6, 20), correlated(20)
    books, scales = books.requires_grad_(), scales.requires_grad_()
    proxy_loss(reconstruct(codes, books, scales) - weight, moment).backward()
    moved, scaled, first = tune_values(weight, moment, books.detach(), scales.detach(), codes, steps=1, lr=1e-5)
    assert abs(first - loss_of(weight, moment, books.detach(), scales.detach(), codes)) < 1e-9 * first
    # the first step of Adam without momentum is lr times the sign of the gradient
    used = books.grad != 0
    assert torch.allclose((books.detach() - moved)[used], 1e-5 * books.grad.sign()[used], atol=1e-11)
    assert torch.allclose((scales.detach() - scaled) / scales.detach(), 1e-5 * scales.grad.sign(), atol=1e-10)


def test_tuning_values_never_raises_the_loss():
    books, codes, scales = random_state()
    weight, moment = normal(6, 20), correlated(20)
    before = loss_of(weight, moment, books, scales, codes)
    for lr in (1e-2, 10.0):
        tuned, scaled, _ = tune_values(weight, moment, books, scales, codes, 20, lr)
        after = loss_of(weight, moment, tuned, scaled, codes)
        assert after <= before
        assert lr > 1 or after < 0.95 * before


def test_clusters_reach_a_fixed_point_and_residuals_shrink():
    x = normal(400, 4)
    draws = torch.Generator().manual_seed(0)
    centres = k_means(x, 8, 100, draws)
    nearest = nearest_entry(x, centres)
    for entry in range(8):
        assert torch.allclose(x[nearest == entry].mean(0), centres[entry], atol=1e-9)
    books, codes = cluster(x, 3, 8, 10, draws)
    lost = [
        (x - reconstruct(codes[:, None, :count], books[:count], torch.ones(400))).square().sum() for count in (1, 2, 3)
    ]
    assert lost[0] > lost[1] > lost[2]
    few = k_means(normal(3, 4), 8, 5, draws)  # more entries than vectors: each is one of them
    assert torch.isfinite(few).all()


def test_the_loop_lowers_the_loss_of_the_outputs():
    weight, moment = normal(64, 64).float(), correlated(64)

    def loss(form):
        return proxy_loss((form.decode(form.encode(weight, statistics(moment)), (64, 64)) - weight).double(), moment)

    start, looped = loss(AQLM(bits=5, epochs=0)), loss(AQLM(bits=5, epochs=3, steps=20))
    assert looped <= 0.8 * start
    assert loss(AQLM(bits=5, epochs=3, steps=0)) < start


def test_merging_keeps_codebooks_and_scales():
    layer = CompressedLinear(SMALL, normal(12, 24).float(), statistics=statistics(correlated(24)))
    before, held = layer.decoded_weight(), {name: t.clone() for name, t in layer.stored.items()}
    layer.encode_weight(before + 0.8)
    assert torch.equal(layer.stored["codebooks"], held["codebooks"])
    assert torch.equal(layer.stored["scales"], held["scales"])
    after = layer.decoded_weight()
    assert (after - before - 0.8).square().sum() < (0.8 * torch.ones(12, 24)).square().sum()
    assert not torch.equal(layer.stored["codes"], held["codes"])


# The share of the loss that must be gone: AQLM trains 152 numbers in each of these layers, QuIP# only 49.
@pytest.mark.parametrize(("form", "left"), [(SMALL, 0.8), (QuIPSharp(signs="float16"), 0.9)], ids=["AQLM", "QuIP#"])
def test_tuning_a_block_brings_its_outputs_nearer_and_leaves_the_codes(form, left):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    inputs = [torch.randn(40, 24) for _ in range(2)]
    targets = [dense(x).detach() for x in inputs]
    held_by = Statistics.neutral(24)
    packed = nn.Sequential(dense[0], *(
        CompressedLinear(form, layer.weight, layer.bias, held_by) if isinstance(layer, nn.Linear) else layer
        for layer in dense[1:]
    ))  # fmt: skip
    held = {name: tensor.clone() for name, tensor in packed.state_dict().items()}

    def loss():
        return sum((packed(x) - y).square().mean().item() for x, y in zip(inputs, targets, strict=True))

    before = loss()
    losses = tune_block(packed, inputs, targets, lambda index, x: packed(x), steps=60, lr=3e-3)
    assert len(losses) == 60
    assert loss() < left * before
    for name, tensor in packed.state_dict().items():
        assert tensor.dtype == held[name].dtype
        assert not tensor.requires_grad
        assert torch.equal(tensor, held[name]) == (name.endswith(("codes", "bias")) and not name.startswith("0."))
    changed = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    tune_block(packed, inputs, targets, lambda index, x: packed(x), steps=3, lr=1e3)  # far too fast: it is put back
    assert all(torch.equal(tensor, changed[name]) for name, tensor in packed.state_dict().items())


def test_wrong_use_says_what_to_do():
    for name, value in (("codebooks", 0), ("group", 0), ("epochs", -1), ("steps", -1), ("beam", 0), ("clustering", 0)):
        with pytest.raises(ValueError, match=rf"AQLM.{name} must be at least"):
            AQLM(**{name: value})
    with pytest.raises(ValueError, match=r"AQLM.bits must be 1 to 16"):
        AQLM(bits=17)
    with pytest.raises(ValueError, match=r"AQLM.lr"):
        AQLM(lr=0.0)
    with pytest.raises(ValueError, match="choose one that does"):
        AQLM().encode(torch.zeros(2, 12), Statistics.neutral(12))
    with pytest.raises(ValueError, match="calibration"):
        AQLM().encode(torch.zeros(2, 16))
    plain = nn.Sequential(CompressedLinear(QuIP(), torch.zeros(4, 8), statistics=Statistics.neutral(8)))
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="nothing to tune"):
        tune_block(plain, [x], [torch.zeros(2, 4)], lambda index, x: plain(x))
    with pytest.raises(ValueError, match="as many inputs as targets"):
        tune_block(plain, [x], [], lambda index, x: plain(x))


@pytest.mark.parametrize("beam", [1, 3])
def test_groups_searched_at_once_get_the_codes_of_groups_searched_in_turn(beam):
    books, codes, scales = random_state()
    weight, same = normal(6, 20), torch.eye(20, dtype=torch.float64)
    at_once = search_apart(weight, books, scales, codes, beam)
    in_turn = [
        beam_search(weight[:, columns], same[:4, :4], books, scales, codes[:, group : group + 1], beam)
        for group, columns in enumerate(torch.arange(20).split(4))
    ]
    assert torch.equal(at_once, torch.cat(in_turn, 1))
    assert not torch.equal(at_once, codes)
    if beam == 1:
        assert torch.equal(at_once, beam_search(weight, same, books, scales, codes))
