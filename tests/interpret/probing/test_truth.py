import pytest
import torch
from torch.nn.functional import normalize

from paperworks.interpret.probing.probes import logistic
from paperworks.interpret.probing.separation import auroc
from paperworks.interpret.probing.truth import centered_by, truth_directions, ttpd


def planted(per_cell=50, topics=4, dim=64, noise=0.3, polarities=(1, -1), seed=0):
    """Return a = tau t_G + tau p t_P + polarity + topic + noise, in a balanced design, with what made it."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    axes = torch.linalg.qr(normal(dim, 3)).Q.T
    general, polar, polarity_axis = axes[0], 1.2 * axes[1], 2 * axes[2]
    rows, tau, p, group = [], [], [], []
    for topic in range(topics):
        offset = 3 * normalize(normal(dim), dim=0)
        for polarity in polarities:
            for truth in (1, -1):
                signal = truth * general + truth * polarity * polar + polarity * polarity_axis + offset
                rows.append(signal + noise * normal(per_cell, dim))
                tau += [truth] * per_cell
                p += [polarity] * per_cell
                group += [f"{topic}{polarity}"] * per_cell
    return torch.cat(rows), torch.tensor(tau), torch.tensor(p), group, general, polar


def cosine(one, other):
    return float(normalize(one, dim=0) @ normalize(other, dim=0))


def test_planted_directions_are_recovered():
    a, tau, p, group, general, polar = planted(200, 5)
    found = truth_directions(a, tau > 0, p > 0, group)
    assert cosine(found.general, general) > 0.99
    assert cosine(found.polar, polar) > 0.99


def test_in_a_balanced_design_least_squares_is_a_mean():
    a, tau, p, group, _, _ = planted(10)
    found = truth_directions(a, tau > 0, p > 0, group)
    centred = centered_by(a, group)
    # Sums of 160 numbers near 1 in float64.
    assert torch.allclose(found.general, (tau[:, None] * centred).mean(0), atol=1e-12)
    assert torch.allclose(found.polar, ((tau * p)[:, None] * centred).mean(0), atol=1e-12)


def test_an_unbalanced_design_solves_the_normal_equations():
    a, tau, p, group, _, _ = planted(10)
    keep = torch.rand(len(a)) < 0.7
    a, tau, p = a[keep], tau[keep], p[keep]
    group = [name for name, kept in zip(group, keep.tolist(), strict=True) if kept]
    found = truth_directions(a, tau > 0, p > 0, group)
    design = torch.stack([tau, tau * p], dim=1).double()
    naive = torch.linalg.inv(design.T @ design) @ design.T @ centered_by(a, group)
    assert torch.allclose(torch.stack([found.general, found.polar]), naive, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_polarity_alone_finds_the_sum_or_the_difference(sign):
    a, tau, p, group, general, polar = planted(200, 5, noise=0.0, polarities=(sign,))
    found = truth_directions(a, tau > 0, p > 0, group)
    assert found.polar is None
    assert torch.allclose(found.general, general + sign * polar, atol=1e-12)
    # |t_G| = 1, |t_P| = 1.2, orthogonal: the angle to t_G has tangent 1.2.
    assert abs(cosine(found.general, general) - 1 / (1 + 1.2**2) ** 0.5) < 1e-12


def test_ttpd_reads_a_topic_it_never_saw_in_both_polarities_where_an_affirmative_probe_is_inverted():
    a, tau, p, group, _, _ = planted(100, 6)
    held = torch.tensor([name.startswith("5") for name in group])
    seen = [name for name in group if not name.startswith("5")]
    probe = ttpd(a[~held], tau[~held] > 0, p[~held] > 0, seen)
    affirmative = ~held & (p > 0)
    biased = logistic(a[affirmative], tau[affirmative] > 0, penalty=1e-6)
    for polarity in (1, -1):
        test = held & (p == polarity)
        assert (probe.predict(a[test]) == (tau[test] > 0)).double().mean() > 0.95
    negated = held & (p < 0)
    # The polarity offset moves all scores alike, so what is inverted is their order.
    assert auroc(biased.score(a[negated]), tau[negated] > 0) < 0.3
    assert auroc(probe.score(a[negated]), tau[negated] > 0) > 0.99


def test_ttpd_is_the_logistic_regression_of_its_two_features():
    a, tau, p, group, _, _ = planted(20, noise=1.5)
    probe = ttpd(a, tau > 0, p > 0, group)
    features = torch.stack([a @ probe.truth.general, a @ probe.polarity], dim=1)
    scores = probe.score(a)
    chance = scores.sigmoid() - (tau > 0).double()
    # At the optimum the errors are uncorrelated with the features, but for a penalty of 1e-6.
    assert chance.sum().abs() < 1e-4
    assert ((features - features.mean(0)) * chance[:, None]).sum(0).abs().max() < 1e-3


def test_with_one_polarity_ttpd_reads_one_feature():
    a, tau, p, group, _, _ = planted(30, polarities=(1,), noise=0.8)
    probe = ttpd(a, tau > 0, p > 0, group)
    assert probe.polarity is None
    assert abs(abs(cosine(probe.direction, probe.truth.general)) - 1) < 1e-12


def test_centring_takes_each_groups_own_mean():
    a = torch.randn(6, 3)
    found = centered_by(a, ["x", "y", "x", "y", "y", "x"])
    assert torch.allclose(found[[0, 2, 5]].mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-7)
    assert torch.equal(found, centered_by(a, torch.tensor([4, 9, 4, 9, 9, 4])))


def test_bad_input_is_refused():
    a, tau, p, group, _, _ = planted(5)
    with pytest.raises(ValueError, match="groups"):
        ttpd(a, tau > 0, p > 0, group[:-1])
    with pytest.raises(ValueError, match="0 and 1"):
        ttpd(a, tau, p > 0, group)
    with pytest.raises(ValueError, match="0 and 1"):
        ttpd(a, tau > 0, p, group)
    with pytest.raises(ValueError, match="both classes"):
        ttpd(a, torch.ones(len(a)), p > 0, group)
    with pytest.raises(ValueError, match="does not vary"):
        ttpd(torch.ones(4, 3), torch.tensor([1, 0, 1, 0]), torch.ones(4), ["x"] * 4)
