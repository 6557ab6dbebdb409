import pytest
import torch

from paperworks.papers.probing.quirky_lm.elicitation import TrustedGaussian, earliest_informative, gap_recovered


def test_the_gap_recovered_is_zero_for_the_output_and_one_for_the_ceiling():
    assert gap_recovered(0.3, 0.3, 0.9) == 0
    assert gap_recovered(0.9, 0.3, 0.9) == 1
    assert abs(gap_recovered(0.6, 0.3, 0.9) - 0.5) < 1e-12
    assert gap_recovered(0.2, 0.3, 0.9) < 0
    with pytest.raises(ValueError, match="no gap"):
        gap_recovered(0.9, 0.9, 0.9)


def test_the_earliest_informative_layer_is_measured_in_excess_over_chance():
    assert earliest_informative([0.5, 0.7, 0.96, 0.98, 0.97]) == 2  # 0.46 of 0.48 is 96%
    assert earliest_informative([0.5, 0.94, 0.98]) == 2  # 0.94 is 96% of 0.98, but its excess only 92%
    assert earliest_informative([0.9]) == 0
    with pytest.raises(ValueError, match="no layer is informative"):
        earliest_informative([0.5, 0.4])


def test_the_distance_is_the_naive_quadratic_form():
    cases, new = torch.randn(50, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    cases = cases @ torch.randn(4, 4, dtype=torch.float64)
    found = TrustedGaussian.of(cases).distance(new)
    inverse = torch.linalg.inv(torch.cov(cases.T))
    naive = torch.stack([((row - cases.mean(0)) @ inverse @ (row - cases.mean(0))).sqrt() for row in new])
    assert torch.allclose(found, naive, rtol=1e-9)


def test_the_distance_ignores_invertible_affine_maps():
    cases, new = torch.randn(60, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    mixing, shift = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    before = TrustedGaussian.of(cases).distance(new)
    after = TrustedGaussian.of(cases @ mixing + shift).distance(new @ mixing + shift)
    assert torch.allclose(before, after, rtol=1e-7)  # the mixing's condition costs some digits


def test_features_without_spread_are_refused():
    flat = torch.cat([torch.randn(20, 2), torch.ones(20, 1)], dim=1)
    with pytest.raises(ValueError, match="without inverse"):
        TrustedGaussian.of(flat)
    with pytest.raises(ValueError, match="without inverse"):
        TrustedGaussian.of(torch.randn(3, 6))
