import math

import pytest
import torch

from paperworks.papers.circuits.grokking_mech_interp import fourier


def random_logits(modulus, answers, seed=0):
    return torch.randn(modulus, modulus, answers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_along_sum(logits, frequencies):
    """Project on cos and sin w_k (a + b), one answer and one wave at a time."""
    p = len(logits)
    part = torch.zeros_like(logits)
    for answer in range(logits.shape[-1]):
        for k in frequencies:
            for wave in (math.cos, math.sin):
                table = torch.tensor(
                    [[wave(2 * math.pi * k * (a + b) / p) for b in range(p)] for a in range(p)], dtype=torch.float64
                )
                table = table / table.norm()
                part[..., answer] += (table * logits[..., answer]).sum() * table
    return part


@pytest.mark.parametrize("modulus", [2, 3, 8, 59, 113])
def test_the_basis_is_orthonormal(modulus):
    basis = fourier.fourier_basis(modulus)
    # float64 sums of at most 113 products
    assert (basis @ basis.mT - torch.eye(modulus, dtype=torch.float64)).abs().max() < 1e-13


@pytest.mark.parametrize("modulus", [7, 8])
def test_power_is_that_of_the_discrete_fourier_transform(modulus):
    weight = torch.randn(modulus, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transformed = torch.fft.fft(weight, dim=0).abs().square().sum(1) / modulus
    # a real signal has the same power at k and p - k, which are one frequency here
    expected = [
        (transformed[k] + (0 if 2 * k == modulus else transformed[modulus - k])).item()
        for k in range(1, modulus // 2 + 1)
    ]
    assert fourier.frequency_power(weight).tolist() == pytest.approx(expected, rel=1e-12)


def test_key_frequencies_are_the_strongest_counted_from_one():
    angle = torch.arange(13) * 2 * torch.pi / 13
    weight = torch.stack([3 * (4 * angle).cos(), 2 * (6 * angle).sin(), 0.1 * (2 * angle).cos()], dim=1)
    assert fourier.key_frequencies(fourier.frequency_power(weight), 2) == (4, 6)


def test_gini_is_the_mean_absolute_difference():
    values = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differences = (values[:, None] - values).abs().mean() / (2 * values.mean())
    assert fourier.gini(values) == pytest.approx(differences.item(), rel=1e-12)
    assert fourier.gini(torch.ones(4)) == pytest.approx(0.0, abs=1e-12)
    assert fourier.gini(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(0.75)


def test_the_written_down_algorithm_follows_its_formula_and_adds():
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    logits = fourier.cosine_logits(7, (1, 3), weights)
    for a, b, c in [(0, 0, 0), (3, 6, 2), (5, 5, 1)]:
        wanted = sum(w * math.cos(2 * math.pi * k * (a + b - c) / 7) for w, k in zip((0.5, 2.0), (1, 3), strict=True))
        assert logits[a, b, c].item() == pytest.approx(wanted, abs=1e-12)
    assert fourier.accuracy_and_loss(logits)[0] == 1.0


def test_restricted_and_excluded_follow_the_projection():
    logits = random_logits(7, 4)
    part = naive_along_sum(logits, (1, 3))
    torch.testing.assert_close(fourier.along_sum(logits, (1, 3)), part, atol=1e-12, rtol=0)
    torch.testing.assert_close(fourier.excluded(logits, (1, 3)), logits - part, atol=1e-12, rtol=0)
    torch.testing.assert_close(fourier.restricted(logits, (1, 3)), part + logits.mean((0, 1)), atol=1e-12, rtol=0)


def test_restricting_keeps_the_algorithm_whole_and_excluding_takes_it_away():
    logits = fourier.cosine_logits(11, (2, 5))
    torch.testing.assert_close(fourier.restricted(logits, (2, 5)), logits, atol=1e-12, rtol=0)
    assert fourier.excluded(logits, (2, 5)).abs().max() < 1e-12
    assert fourier.along_sum(logits, (1, 3)).abs().max() < 1e-12


def test_the_fit_finds_the_weights_and_ignores_what_every_answer_gets():
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    fit = fourier.fit_cosines(fourier.cosine_logits(11, (1, 4), weights) + random_logits(11, 1), (1, 4))
    assert fit.weights.tolist() == pytest.approx([0.5, 2.0], abs=1e-12)
    assert fit.explained == pytest.approx(1.0, abs=1e-12)


def test_the_fit_is_least_squares():
    logits = random_logits(7, 7)
    centred = logits - logits.mean(-1, keepdim=True)
    waves = torch.stack([fourier.cosine_logits(7, [k]).flatten() for k in (1, 2)], dim=1)
    solution = torch.linalg.lstsq(waves, centred.flatten()[:, None]).solution[:, 0]
    residual = centred.flatten() - waves @ solution
    fit = fourier.fit_cosines(logits, (1, 2))
    torch.testing.assert_close(fit.weights, solution, atol=1e-12, rtol=0)
    assert fit.explained == pytest.approx(1 - (residual.square().sum() / centred.square().sum()).item(), abs=1e-12)


@pytest.mark.parametrize("modulus", [7, 8])
def test_a_neuron_of_one_frequency_is_explained_by_it(modulus):
    x = torch.arange(modulus) * 2 * torch.pi / modulus
    pure = 3 + (2 * x)[:, None].cos() * (2 * x).sin() - 0.5 * (2 * x).cos()
    mixed = (1 * x)[:, None].cos() + 2 * (3 * x).cos() + 0 * pure  # powers 1 and 4
    found, share = fourier.neuron_frequencies(torch.stack([pure, mixed, torch.full_like(pure, 4.0)], dim=-1))
    assert found[:2].tolist() == [2, 3]
    assert share.tolist() == pytest.approx([1.0, 0.8, 0.0], abs=1e-6)  # the tables are float32


def test_accuracy_and_loss_are_over_the_pairs_asked_for():
    logits = random_logits(5, 5)
    pairs = torch.zeros(5, 5, dtype=torch.bool)
    pairs[1, 3] = pairs[4, 4] = True
    rows = [(logits[1, 3], 4), (logits[4, 4], 3)]
    accuracy, loss = fourier.accuracy_and_loss(logits, pairs)
    assert accuracy == sum(int(row.argmax()) == right for row, right in rows) / 2
    assert loss == pytest.approx(sum(-row.log_softmax(0)[right].item() for row, right in rows) / 2, rel=1e-12)


def test_bad_input_is_refused_with_what_would_be_right():
    with pytest.raises(ValueError, match="at least 2; got 1"):
        fourier.fourier_basis(1)
    with pytest.raises(ValueError, match="one row a residue"):
        fourier.frequency_power(torch.ones(5))
    with pytest.raises(ValueError, match="between 1 and the 3 frequencies"):
        fourier.key_frequencies(torch.ones(3), 4)
    with pytest.raises(ValueError, match="values >= 0, some positive"):
        fourier.gini(torch.zeros(3))
    with pytest.raises(ValueError, match="different numbers from 1 to 3 modulo 7"):
        fourier.restricted(random_logits(7, 7), (4,))
    with pytest.raises(ValueError, match="different numbers"):
        fourier.excluded(random_logits(7, 7), (1, 1))
    with pytest.raises(ValueError, match="one weight a frequency"):
        fourier.cosine_logits(7, (1, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(modulus, modulus, values\)"):
        fourier.along_sum(torch.ones(7, 6, 5), (1,))
    with pytest.raises(ValueError, match="one logit a residue: got 4"):
        fourier.fit_cosines(random_logits(7, 4), (1,))
    with pytest.raises(ValueError, match="do not depend on the answer"):
        fourier.fit_cosines(torch.ones(7, 7, 7), (1,))
    with pytest.raises(ValueError, match="at least one pair"):
        fourier.accuracy_and_loss(random_logits(5, 5), torch.zeros(5, 5, dtype=torch.bool))
