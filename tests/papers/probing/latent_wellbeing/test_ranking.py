import pytest
import torch

from paperworks.interpret.probing.probes import logistic
from paperworks.papers.probing.latent_wellbeing.ranking import fit_ranking, principal_components


def texts(pairs=80, dim=12, seed=0):
    """Embeddings whose third-largest direction says which text of a pair is better."""
    draws = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=draws, dtype=torch.float64)).Q.T
    scale = torch.tensor([6.0, 4.0, 2.0] + [0.3] * (dim - 3), dtype=torch.float64)
    better, worse = (torch.randn(pairs, dim, generator=draws, dtype=torch.float64) * scale for _ in range(2))
    higher = better[:, 2] > worse[:, 2]
    better[~higher], worse[~higher] = worse[~higher].clone(), better[~higher].clone()
    return better @ axes + 5, worse @ axes + 5, axes


def share(probe, better, worse):
    return float((probe.score(better) > probe.score(worse)).double().mean())


def test_components_are_the_eigenvectors_of_the_covariance():
    rows = torch.cat(texts()[:2])
    centred = rows - rows.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :4].T
    found = principal_components(rows, 4)
    assert torch.allclose((found * vectors).sum(1).abs(), torch.ones(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found @ found.T, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_the_third_component_ranks_and_the_first_two_do_not():
    better, worse, axes = texts()
    new = texts(seed=0)[:2]
    assert share(fit_ranking(better, worse, 3), *new) > 0.95
    assert share(fit_ranking(better, worse, 2), *new) < 0.75
    assert abs(fit_ranking(better, worse, 3).unit @ axes[2]) > 0.95


def test_all_components_are_regression_on_the_differences_themselves():
    better, worse, _ = texts()
    whole = fit_ranking(better, worse)
    # The loss is rotation invariant; both solvers stop at 1e-9 of the gradient.
    assert torch.allclose(fit_ranking(better, worse, 12).direction, whole.direction, atol=1e-6)
    assert torch.allclose(fit_ranking(better, worse, 12, mode="paired").direction, whole.direction, atol=1e-6)


def test_the_regression_is_the_naive_one_of_randomly_ordered_pairs():
    better, worse, _ = texts()
    turned = torch.rand(len(better)) < 0.5
    features = torch.where(turned[:, None], worse - better, better - worse)
    naive = logistic(features, ~turned, penalty=1.0, intercept=False)
    assert torch.allclose(fit_ranking(better, worse, penalty=1.0).direction, naive.direction, atol=1e-6)


@pytest.mark.parametrize("mode", ["single", "paired"])
def test_swapping_the_sides_flips_every_decision(mode):
    better, worse, _ = texts()
    one, other = fit_ranking(better, worse, 3, mode=mode), fit_ranking(worse, better, 3, mode=mode)
    assert torch.allclose(one.direction, -other.direction, atol=1e-8)
    assert one.bias == 0
    assert share(one, better, worse) == 1 - share(other, better, worse)


def test_with_one_component_labels_only_choose_the_sign():
    better, worse, axes = texts()
    found = fit_ranking(better, worse, 1)
    assert abs(found.unit @ principal_components(torch.cat([better, worse]), 1)[0]) > 1 - 1e-12
    assert abs(found.unit @ axes[0]) > 0.9


def test_bad_input_is_refused():
    better, worse, _ = texts()
    with pytest.raises(ValueError, match="pair up"):
        fit_ranking(better, worse[:-1])
    with pytest.raises(ValueError, match="unknown mode"):
        fit_ranking(better, worse, 1, mode="both")
    with pytest.raises(ValueError, match="count is 1 to 12, got 13"):
        fit_ranking(better, worse, 13)
    with pytest.raises(ValueError, match="all alike"):
        principal_components(torch.ones(4, 3), 1)
