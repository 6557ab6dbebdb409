import pytest
import torch

from paperworks import train
from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.ccs import ConsistencyProbes, ContrastProbe, Normalization, consistency_loss


def planted(n=300, dim=64, truth=1.0, token=5.0, noise=0.3, seed=0):
    """Pairs a = base + noise +- (truth t y + token u): base shared in a pair, t the truth, u what "yes" adds."""
    draws = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, 2, generator=draws)).Q.T
    labels = torch.rand(n, generator=draws) < 0.5
    base = torch.randn(n, dim, generator=draws)
    shift = truth * (labels.float() * 2 - 1)[:, None] * axes[0] + token * axes[1]
    own = noise * torch.randn(2, n, dim, generator=draws)
    return base + own[0] + shift, base + own[1] - shift, labels, axes


def fit(positive, negative, scaling="std", steps=400, starts=5):
    normalization = Normalization.of(positive, negative, scaling)
    pairs = tuple(side.float() for side in normalization(positive, negative))
    torch.manual_seed(0)
    probes = ConsistencyProbes(positive.shape[1], starts)
    settings = train.Settings(
        steps=steps, lr=3e-3, schedule="constant", warmup=0, clip=None, seed=None, save_every=None, progress=False
    )
    train.fit(probes, ccs.ccs_loss, [pairs], settings)
    return ccs.best_of(probes, normalization, positive, negative)


def share_right(probe, positive, negative, labels):
    right = float(((probe.score(positive, negative) > 0) == labels).double().mean())
    return max(right, 1 - right)


def test_the_loss_is_zero_exactly_for_confident_consistent_probes():
    truth = (torch.rand(50) < 0.5).double()
    assert consistency_loss(truth, 1 - truth) == 0
    half = torch.full((50,), 0.5, dtype=torch.float64)
    assert consistency_loss(half, half) == 0.25
    assert consistency_loss(truth, truth) > 0  # consistent with nothing
    assert consistency_loss(torch.tensor([0.9]), torch.tensor([0.1])) > 0  # not quite sure


def test_the_loss_is_the_papers_equation_and_does_not_know_the_sides():
    positive, negative = torch.rand(7, 20, dtype=torch.float64), torch.rand(7, 20, dtype=torch.float64)
    naive = [
        sum((a - (1 - b)) ** 2 + min(a, b) ** 2 for a, b in zip(p.tolist(), n.tolist(), strict=True)) / 20
        for p, n in zip(positive, negative, strict=True)
    ]
    assert torch.allclose(consistency_loss(positive, negative), torch.tensor(naive, dtype=torch.float64), atol=1e-14)
    assert torch.equal(consistency_loss(positive, negative), consistency_loss(negative, positive))


def test_starts_are_trained_as_if_each_were_alone():
    positive, negative, _, _ = planted(40, 8)
    probes = ConsistencyProbes(8, 3)
    ccs.ccs_loss(probes, (positive, negative)).backward()
    for start in range(3):
        weight = probes.weight[start].detach().clone().requires_grad_()
        chances = [torch.sigmoid(side @ weight + probes.bias[start].detach()) for side in (positive, negative)]
        consistency_loss(*chances).backward()
        assert torch.allclose(weight.grad, probes.weight.grad[start], atol=1e-6)


def test_normalisation_takes_away_what_makes_the_sides_differ():
    positive, negative, _, axes = planted()
    for scaling, spread in (("std", 1.0), ("mean", None)):
        one, other = Normalization.of(positive, negative, scaling)(positive, negative)
        assert one.mean(0).abs().max() < 1e-6
        assert other.mean(0).abs().max() < 1e-6
        if spread:
            assert torch.allclose(one.std(0, correction=0), torch.ones(64, dtype=torch.float64), atol=1e-6)
    one, other = Normalization.of(positive, negative, "none")(positive, negative)
    assert torch.equal(one, positive.double())
    assert ((one - other) @ axes[1].double()).mean() > 9  # 2 x 5, there before and gone after


def test_a_dimension_that_never_varies_stays_finite():
    positive, negative, _, _ = planted(30, 4)
    positive[:, 0] = negative[:, 0] = 7.0
    one, other = Normalization.of(positive, negative)(positive, negative)
    assert torch.equal(one[:, 0], torch.zeros(30, dtype=torch.float64))
    assert torch.isfinite(other).all()


def test_planted_truth_is_found_without_labels_and_not_without_normalisation():
    positive, negative, labels, _ = planted()
    assert share_right(fit(positive, negative), positive, negative, labels) > 0.95
    assert share_right(fit(positive, negative, "none"), positive, negative, labels) < 0.7
    assert share_right(ccs.crc_tpc(positive, negative), positive, negative, labels) > 0.95
    assert share_right(ccs.crc_two_means(positive, negative), positive, negative, labels) > 0.95


def test_two_means_ends_where_each_pair_is_nearest_to_its_own_centroid():
    positive, negative, _, _ = planted(80, 6)
    probe = ccs.crc_two_means(positive, negative)
    apart = torch.sub(*probe.normalization(positive, negative))
    inside = None
    for offset in apart @ probe.direction:  # some cut along the direction separates the clusters
        chosen = apart @ probe.direction > offset
        if chosen.any() and not chosen.all():
            first, second = apart[chosen].mean(0), apart[~chosen].mean(0)
            if torch.allclose(first - second, probe.direction, atol=1e-9):
                inside = chosen
                nearest = (apart - first).norm(dim=1) < (apart - second).norm(dim=1)
                assert torch.equal(nearest, inside)
    assert inside is not None


def test_swapping_both_sides_flips_the_sign_and_labels_fix_it():
    positive, negative, labels, _ = planted(60, 8)
    probe = ContrastProbe(torch.randn(8, dtype=torch.float64), Normalization.of(positive, negative), 0.3)
    n = probe.normalization
    swapped = ContrastProbe(
        probe.direction,
        Normalization(n.negative_mean, n.positive_mean, n.negative_scale, n.positive_scale),
        0.3,
    )
    assert torch.equal(swapped.score(negative, positive), -probe.score(positive, negative))
    for start in (probe, -probe):
        signed = start.signed_by(positive, negative, labels)
        assert ((signed.score(positive, negative) > 0) == labels).double().mean() >= 0.5


def test_the_negated_probe_says_the_opposite():
    positive, negative, _, _ = planted(20, 8)
    probe = ContrastProbe(torch.randn(8, dtype=torch.float64), Normalization.of(positive, negative), 0.3)
    # sigmoid(-z) = 1 - sigmoid(z), so both sides change by the same amount.
    assert torch.allclose((-probe).score(positive, negative), -probe.score(positive, negative), atol=1e-12)


def test_a_contrast_probe_reads_single_statements_when_its_sides_share_a_scale():
    positive, negative, labels, _ = planted(200, 8, noise=0.1)
    probe = fit(positive, negative, "mean").signed_by(positive, negative, labels)
    single = ccs.on_statements(probe)
    assert (single.predict(positive - positive.mean(0)) == labels).double().mean() > 0.6
    with pytest.raises(ValueError, match="different scales"):
        ccs.on_statements(fit(positive, negative, "std", steps=2))


def test_bad_input_is_refused():
    positive, negative, _, _ = planted(10, 4)
    with pytest.raises(ValueError, match="one shape"):
        Normalization.of(positive, negative[:5])
    with pytest.raises(ValueError, match="unknown scaling"):
        Normalization.of(positive, negative, "variance")
    with pytest.raises(ValueError, match="at least one"):
        ConsistencyProbes(0)
    with pytest.raises(ValueError, match="all alike"):
        ccs.crc_two_means(positive, positive)
