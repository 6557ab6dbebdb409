import math

import pytest

from paperworks.lab import AtLeast, AtMost, Beats, Within

NUMBERS = {
    "LoRA": {"loss": [0.2, 0.3, 0.4], "accuracy": [0.9, 0.8, 0.7]},
    "all weights": {"loss": [0.25, 0.3, 0.32], "accuracy": [0.9, 0.9, 0.9]},
    "B never updated": {"loss": [0.6, 0.7, 0.83], "accuracy": [0.5, 0.4, 0.5]},
}


def test_a_check_describes_itself_in_one_line_with_what_it_came_to():
    beats = Beats("LoRA", "B never updated", on="loss", by=0.3, lower=True)
    assert beats.line(NUMBERS) == "LoRA beats B never updated on loss by at least 0.3: 0.41 (3 of 3 seeds)"
    within = Within("LoRA", "all weights", on="loss", by=0.1)
    assert within.line(NUMBERS) == "LoRA is within 0.1 of all weights on loss: 0.01"
    assert AtLeast("LoRA", 0.7, on="accuracy").line(NUMBERS) == "accuracy of LoRA is at least 0.7: 0.8"
    assert AtMost("LoRA", 0.5, on="loss").line(NUMBERS) == "loss of LoRA is at most 0.5: 0.3"


def test_seeds_are_paired():
    # The margin of 0.4 is reached in the mean and on two of the seeds, each against the control of the same seed.
    beats = Beats("LoRA", "B never updated", on="loss", by=0.405, lower=True)
    assert beats.advantages(NUMBERS) == pytest.approx([0.4, 0.4, 0.43])
    assert beats.passing_seeds(NUMBERS) == [False, False, True]
    assert beats.passes(NUMBERS)


def test_higher_is_better_unless_lower_is_said():
    assert Beats("LoRA", "B never updated", on="accuracy", by=0.2).passes(NUMBERS)
    assert not Beats("LoRA", "B never updated", on="loss", by=0.2).passes(NUMBERS)


def test_a_relative_margin_is_a_share_of_the_control():
    # The control's mean is 0.71, the advantage 0.41, which is 58% of it.
    assert Beats("LoRA", "B never updated", on="loss", by_ratio=0.57, lower=True).passes(NUMBERS)
    missed = Beats("LoRA", "B never updated", on="loss", by_ratio=0.59, lower=True)
    assert not missed.passes(NUMBERS)
    assert missed.line(NUMBERS) == (
        "LoRA beats B never updated on loss by at least 59.0%: 0.41, 58% of the control (1 of 3 seeds)"
    )


def test_within_has_two_sides_unless_a_direction_is_given():
    better = {"a": {"loss": [0.1]}, "b": {"loss": [0.5]}}
    assert not Within("a", "b", on="loss", by=0.1).passes(better)
    assert Within("a", "b", on="loss", by=0.1, lower=True).passes(better)
    assert not Within("b", "a", on="loss", by=0.1, lower=True).passes(better)
    assert Within("b", "a", on="loss", by=0.1, lower=False).passes(better)


def test_a_check_without_a_margin_needs_a_true_difference():
    assert not Beats("a", "b", on="x").passes({"a": {"x": [1.0]}, "b": {"x": [1.0]}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beats("a", "a", on="x", by=1), "compared with itself"),
        (lambda: Beats("a", "b", on="x", by=1, by_ratio=1), "give one of them"),
        (lambda: Beats("a", "b", on="x", by=-1), "0 or above"),
        (lambda: Beats("a", "b", on="x", by=math.nan), "finite"),
        (lambda: Within("a", "b", on="x"), "states no margin"),
        (lambda: Within("a", "b", on="x", by=0), "states no margin"),
    ],
)
def test_a_check_that_says_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
