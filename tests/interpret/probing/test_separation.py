import pytest
import torch

from paperworks.interpret.probing.separation import (
    Estimate,
    accuracy,
    auroc,
    bootstrap,
    rank_correlation,
    ranks,
    wilson,
)


def counted(scores, labels):
    """AUROC by brute force: the share of pairs in order, ties counting half."""
    pairs = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, inside in zip(scores.tolist(), labels.tolist(), strict=True)
        if inside
        for other, beside in zip(scores.tolist(), labels.tolist(), strict=True)
        if not beside
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("levels", [1, 3, 1000])  # all tied, many ties, hardly any
def test_auroc_counts_pairs(levels):
    scores, labels = torch.randint(levels, (60,)), torch.rand(60) < 0.3
    # Ranks are halves and whole numbers below 61: exact in float64 but for one division.
    assert abs(auroc(scores.float(), labels) - counted(scores, labels)) < 1e-12


def test_auroc_knows_the_order_of_the_scores_only():
    scores, labels = torch.randn(80, dtype=torch.float64), torch.rand(80) < 0.5
    assert auroc(3 * scores - 7, labels) == auroc(scores, labels)
    assert abs(auroc(-scores, labels) - (1 - auroc(scores, labels))) < 1e-12
    assert abs(auroc(scores, ~labels) - (1 - auroc(scores, labels))) < 1e-12


def test_random_scores_have_auroc_one_half_on_average():
    labels = torch.arange(100) < 50
    found = [auroc(torch.randn(100), labels) for _ in range(400)]
    # The standard deviation of one is sqrt(101 / (12 * 50 * 50)) = 0.058, of the mean 0.003; five of them.
    assert abs(sum(found) / len(found) - 0.5) < 0.015


def test_wilson_solves_its_own_equation():
    for correct, n in [(0, 10), (7, 10), (10, 10), (431, 960)]:
        found = wilson(correct, n)
        for bound in (found.low, found.high):  # |p_hat - p| = z sqrt(p (1 - p) / n) at both ends
            reach = 1.959963984540054 * (bound * (1 - bound) / n) ** 0.5
            # Near 0 and 1 the root of a rounding error of 1e-16 is 1e-8.
            assert abs(abs(correct / n - bound) - reach) < 3e-8
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.n == n


def test_accuracy_says_how_many_cases_it_rests_on():
    found = accuracy(torch.tensor([1.0, -1.0, 2.0, -0.5]), torch.tensor([1, 0, 0, 0]))
    assert (found.value, found.n) == (0.75, 4)
    assert str(found).startswith("0.750 [")


def test_a_bootstrap_covers_the_mean_and_widens_with_clusters():
    values = torch.randn(20).repeat_interleave(10)  # ten copies of each: 20 independent values, not 200

    def mean(rows):
        return float(values[rows].mean())

    alone, clustered = bootstrap(mean, 200), bootstrap(mean, torch.arange(200) // 10)
    assert alone.low < alone.value < alone.high
    assert alone.value == clustered.value
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)  # sqrt(10) = 3.2 in expectation
    assert bootstrap(mean, 200, seed=3) == bootstrap(mean, 200, seed=3)


def test_a_bootstrap_draws_again_where_a_class_went_missing():
    labels = torch.tensor([1, 0, 0, 0, 0])
    found = bootstrap(lambda rows: auroc(torch.arange(5.0)[rows], labels[rows]), 5, draws=50)
    assert isinstance(found, Estimate)
    with pytest.raises(ValueError, match="both classes"):
        bootstrap(lambda rows: auroc(torch.arange(5.0)[rows], torch.ones(5)[rows]), 5, draws=5)


def test_impossible_questions_are_refused():
    with pytest.raises(ValueError, match="both classes"):
        auroc(torch.randn(3), torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        auroc(torch.tensor([1.0, float("nan")]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="must have shape"):
        auroc(torch.randn(3), torch.ones(2))
    with pytest.raises(ValueError, match="0 and 1"):
        auroc(torch.randn(3), torch.tensor([1, -1, 1]))
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap(lambda rows: 0.0, 3, draws=1)
    with pytest.raises(ValueError, match="no rows"):
        bootstrap(lambda rows: 0.0, 0)


def test_rank_correlation_is_pearsons_of_mean_ranks():
    one, other = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0]
    by_hand = torch.tensor([[3, 1.5, 4, 1.5, 5, 6], [2.5, 4, 1, 5.5, 2.5, 5.5]], dtype=torch.float64)
    assert torch.equal(ranks(torch.tensor(one)), by_hand[0])
    assert rank_correlation(one, other) == pytest.approx(float(torch.corrcoef(by_hand)[0, 1]), abs=1e-12)
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(values, values.exp()) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        rank_correlation([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no order to compare"):
        rank_correlation([1.0, 1.0], [1.0, 2.0])
