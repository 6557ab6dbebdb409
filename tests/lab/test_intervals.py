import pytest

from paperworks.lab.intervals import paired_bootstrap

# Ten differences without a common step: another draw of resamples gives other ends.
METHOD = [0.11, 0.27, 0.39, 0.02, 0.58, 0.73, 0.31, 0.47, 0.66, 0.19]
CONTROL = [1.0, 1.03, 1.17, 1.41, 1.2, 1.09, 1.33, 0.98, 1.5, 1.26]


def test_the_interval_is_always_the_same():
    assert paired_bootstrap(METHOD, CONTROL) == paired_bootstrap(METHOD, CONTROL)


def test_the_interval_agrees_with_the_normal_one_for_ten_seeds():
    interval = paired_bootstrap(METHOD, CONTROL)
    differences = [ours - theirs for ours, theirs in zip(METHOD, CONTROL, strict=True)]
    mean = sum(differences) / 10
    error = (sum((difference - mean) ** 2 for difference in differences) / 10 / 10) ** 0.5
    assert interval["mean"] == pytest.approx(mean)
    # The bootstrap's standard error is the plug-in one; its ends are normal up to the skewness of ten values.
    assert interval["low"] == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert interval["high"] == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_too_few_seeds_are_refused():
    with pytest.raises(ValueError, match="4 seeds are too few"):
        paired_bootstrap(METHOD[:4], CONTROL[:4])
