import math

import pytest

from paperworks import train

# Schedules are a handful of float64 operations: 1e-12 is far above their rounding.
EXACT = pytest.approx


def rates(**settings: object) -> list[float]:
    made = train.Settings(lr=1.0, **settings)  # type: ignore[arg-type]
    return [made.factor(step) for step in range(made.steps)]


def test_constant_stays_at_the_peak() -> None:
    assert rates(steps=5, schedule="constant", warmup=0) == [1.0] * 5


def test_linear_falls_by_equal_parts_to_the_floor() -> None:
    expected = [0.2 + 0.8 * (1 - step / 10) for step in range(10)]
    assert rates(steps=10, schedule="linear", warmup=0, min_lr=0.2) == EXACT(expected, abs=1e-12)


def test_cosine_is_half_a_period_after_the_warmup() -> None:
    curve = rates(steps=30, schedule="cosine", warmup=10, min_lr=0.1)
    assert curve[:10] == EXACT([(step + 1) / 10 for step in range(10)], abs=1e-12)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert curve[10:] == EXACT(expected, abs=1e-12)
    assert curve[9] == curve[10] == 1.0
    assert curve[20] == EXACT(0.55, abs=1e-12)  # half way down, at half the steps


def test_warmup_stable_decay_holds_and_then_falls_linearly() -> None:
    curve = rates(steps=20, schedule=train.WarmupStableDecay(decay=5), warmup=2, min_lr=0.0)
    assert curve == EXACT([0.5, 1.0] + [1.0] * 13 + [1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-12)


def test_warmup_stable_decay_may_fall_as_one_minus_a_square_root() -> None:
    curve = rates(steps=10, schedule=train.WarmupStableDecay(decay=4, shape="sqrt"), warmup=0, min_lr=0.0)
    assert curve[6:] == EXACT([1 - math.sqrt(step / 4) for step in range(4)], abs=1e-12)


def test_a_decay_below_one_is_a_share_of_the_steps_after_the_warmup() -> None:
    share = rates(steps=110, schedule=train.WarmupStableDecay(decay=0.2), warmup=10)
    assert share == rates(steps=110, schedule=train.WarmupStableDecay(decay=20), warmup=10)


def test_a_warmup_below_one_is_a_share_of_the_steps() -> None:
    assert rates(steps=200, warmup=0.05) == rates(steps=200, warmup=10)


def test_no_step_is_spent_at_rate_zero() -> None:
    for schedule in ("constant", "linear", "cosine", "wsd"):
        assert min(rates(steps=17, schedule=schedule, warmup=3, min_lr=0.0)) > 0


@pytest.mark.parametrize(
    ("wrong", "said"), [({"decay": 0}, "decay is 0"), ({"decay": 2.5}, "whole steps"), ({"shape": "sqr"}, "'sqrt'")]
)
def test_a_wrong_decay_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train.WarmupStableDecay(**wrong)


def test_the_inverse_square_root_is_the_transformers_schedule() -> None:
    """dim^-0.5 * min(n^-0.5, n * warmup^-1.5); the peak of the base model is 6.988e-4 at step 4,000 (catalogue)."""
    dim, warmup = 512, 4000
    peak = (dim * warmup) ** -0.5
    assert peak == EXACT(6.988e-4, rel=1e-3)
    made = train.Settings(steps=9000, lr=peak, warmup=warmup, schedule=train.InverseSqrt(warmup), min_lr=0.0)
    for n in (1, 2, 3999, 4000, 4001, 9000):
        assert peak * made.factor(n - 1) == EXACT(dim**-0.5 * min(n**-0.5, n * warmup**-1.5), rel=1e-12)
    with pytest.raises(ValueError, match="at least 1 step"):
        train.InverseSqrt(0)
