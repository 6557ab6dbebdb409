import random

import numpy
import pytest
import torch

from paperworks.lab import AtLeast, Beats, Lab, Within
from paperworks.lab.compare import MOST_POINTS, mean_curve, thinned
from paperworks.lab.seeding import default_count, offsets


def constant(**metrics):
    return lambda seed: metrics


def by_seed(values, name="loss"):
    return lambda seed: {name: values[seed]}


MAIN = Beats("method", "control", on="loss", by=0.3, lower=True)


def judged(method, control, also=(), seeds=3, **others):
    arms = {"method": by_seed(method), "control": by_seed(control), **others}
    return Lab().compare(arms=arms, main=MAIN, also=also, seeds=seeds)


def test_a_comparison_holds_when_the_main_check_passes_in_every_seed_and_the_others_in_the_mean():
    also = [AtLeast("control", 1.0, on="loss")]  # 0.9, 1.0, 1.2: passes in the mean only
    verdict = judged([0.1, 0.2, 0.3], [0.9, 1.0, 1.2], also)
    assert verdict.status == "holds"
    assert list(verdict.checks) == [
        "method beats control on loss by at least 0.3: 0.8333 (3 of 3 seeds)",
        "loss of control is at least 1: 1.033",
    ]


def test_a_comparison_is_partly_when_one_seed_misses_the_margin():
    verdict = judged([0.1, 0.2, 0.8], [0.9, 1.0, 1.0])
    assert verdict.status == "partly"
    assert list(verdict.checks.values()) == [False]


def test_a_comparison_is_partly_when_another_check_fails():
    assert judged([0.1] * 3, [1.0] * 3, [AtLeast("method", 0.5, on="loss")]).status == "partly"


def test_a_comparison_is_not_reproduced_when_the_margin_is_missed_in_the_mean():
    # One seed reaches it, and every other check passes.
    verdict = judged([0.6, 0.9, 0.9], [1.0] * 3, [AtLeast("method", 0.1, on="loss")])
    assert verdict.status == "not reproduced"


def test_the_verdict_keeps_every_arm_and_seed():
    verdict = judged([0.1, 0.2, 0.3], [0.9, 1.0, 1.1], other=constant(loss=0.5))
    assert verdict.seeds == (0, 1, 2)
    assert verdict.arms == {
        "method": {"loss": [0.1, 0.2, 0.3]},
        "control": {"loss": [0.9, 1.0, 1.1]},
        "other": {"loss": [0.5, 0.5, 0.5]},
    }
    assert verdict.measured == {"loss, method": pytest.approx(0.2)}
    assert verdict.control == {"loss, control": pytest.approx(1.0)}


def test_an_interval_is_given_from_five_seeds_and_is_paired_and_always_the_same():
    assert judged([0.1] * 4, [1.0] * 4, seeds=4).interval is None
    # The two arms vary together by much more than they differ, so only a paired interval is narrow.
    control = [1.0, 3.0, 5.0, 7.0, 9.0]
    method = [value - 0.5 - 0.01 * index for index, value in enumerate(control)]
    first, second = (judged(method, control, seeds=5) for _ in range(2))
    assert first.interval == second.interval
    assert first.interval["mean"] == pytest.approx(-0.52)
    assert -0.54 <= first.interval["low"] < -0.52 < first.interval["high"] <= -0.5
    assert first.difference == "loss, method - control"


@pytest.mark.parametrize(
    ("arms", "main", "message"),
    [
        ({"method": constant(loss=1.0)}, MAIN, "at least two arms"),
        ({"method": constant(loss=1.0), "other": constant(loss=1.0)}, MAIN, "unknown arm 'control'"),
        (None, Beats("method", "control", on="loss"), "has no margin; state by="),
        (None, Beats("method", "control", on="loss", by=0.0), "has no margin"),
        (None, Within("method", "control", on="loss", by=0.1), "the main check is Beats"),
        (None, Beats("method", "control", on="los", by=1.0), "unknown metric 'los'; did you mean 'loss'"),
    ],
)
def test_a_comparison_that_cannot_bind_is_refused(arms, main, message):
    arms = arms or {"method": constant(loss=1.0), "control": constant(loss=2.0)}
    with pytest.raises(ValueError, match=message):
        Lab().compare(arms=arms, main=main, seeds=2)


def test_a_design_is_refused_before_any_arm_runs():
    def arm(seed):
        raise AssertionError

    with pytest.raises(ValueError, match="unknown arm"):
        Lab().compare(arms={"method": arm, "control": arm}, main=MAIN, also=[AtLeast("third", 1, on="loss")])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"loss": float("nan")}, "control, seed 0, loss' is nan"),
        ({"loss": [1.0, float("inf")]}, "is inf"),
        ({"accuracy": 1.0}, "every arm returns the same metrics"),
        ({"loss": 1.0, "accuracy": 1.0}, "every arm returns the same metrics"),
        ({"loss": [1.0, 2.0]}, "every arm returns the same metrics"),
        ({"loss": "low"}, "returns numbers and lists of numbers"),
        ({"loss": []}, "empty list"),
        ({}, "return its metrics"),
        (0.5, "return its metrics"),
    ],
)
def test_what_an_arm_may_not_return_is_refused_at_once(returned, message):
    calls = []

    def method(seed):
        calls.append(seed)
        return {"loss": 1.0}

    with pytest.raises(ValueError, match=message):
        Lab().compare(arms={"method": method, "control": lambda seed: returned}, main=MAIN, seeds=3)
    assert calls == [0]


def test_a_curve_cannot_be_judged():
    with pytest.raises(ValueError, match="'loss' is a curve"):
        Lab().compare(arms={"method": constant(loss=[1.0]), "control": constant(loss=[2.0])}, main=MAIN, seeds=1)


def test_every_arm_and_seed_starts_from_its_own_seed():
    def draw(seed):
        return {"loss": random.random() + numpy.random.rand() + float(torch.rand(()))}

    arms = {"method": draw, "control": draw, "third": draw}
    verdict = Lab().compare(arms=arms, main=MAIN, seeds=3)
    values = verdict.arms["method"]["loss"]
    assert len(set(values)) == 3
    assert verdict.arms["control"]["loss"] == verdict.arms["third"]["loss"] == values


def test_a_design_run_has_other_seeds_than_the_judgement():
    seen = []

    def arm(seed):
        seen.append(seed)
        return {"loss": 1.0}

    Lab(seed=100).compare(arms={"method": arm, "control": arm}, main=MAIN, seeds=[0, 2])
    assert seen == [100, 100, 102, 102]


def timed(monkeypatch, seconds):
    """Arms whose first and later runs take the given seconds by the clock; returns the seeds that were run."""
    now = [0.0]
    monkeypatch.setattr("paperworks.lab.stopwatch.now", lambda: (now[0], now[0]))
    runs = []

    def arm(seed):
        now[0] += seconds[0] if not runs else seconds[1]
        runs.append(seed)
        return {"loss": 1.0}

    return list(Lab().compare(arms={"method": arm, "control": arm}, main=MAIN).seeds)


@pytest.mark.parametrize(
    ("seconds", "count"),
    [((1, 1), 10), ((2.9, 2.9), 10), ((3, 3), 3), ((29, 29), 3), ((30, 30), 2), ((40, 1), 10), ((5, 31), 2)],
)
def test_the_number_of_seeds_follows_the_time_of_an_arm_once_its_imports_are_done(monkeypatch, seconds, count):
    assert timed(monkeypatch, seconds) == list(range(count))


def test_default_counts_and_given_seeds():
    assert [default_count(seconds) for seconds in (0.1, 2.99, 3, 29.9, 30)] == [10, 10, 3, 3, 2]
    assert offsets(3) == [0, 1, 2]
    assert offsets([4, 1]) == [4, 1]
    for bad in (0, [], [-1], [1, 1]):
        with pytest.raises(ValueError, match="seeds="):
            offsets(bad)


def test_a_smoke_run_takes_one_seed():
    verdict = Lab("smoke").compare(arms={"method": constant(loss=1.0), "control": constant(loss=2.0)}, main=MAIN)
    assert verdict.seeds == (0,)


def test_curves_are_stored_as_means_over_the_seeds():
    def arm(seed):
        return {"loss": 1.0, "curve": [float(seed), seed + 2.0]}

    verdict = Lab().compare(arms={"method": arm, "control": arm}, main=MAIN, seeds=3)
    assert verdict.curves["method"] == {"curve": [1.0, 3.0]}


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [float(index) for index in range(1000)]
    short = thinned(points)
    assert len(short) == MOST_POINTS
    assert (short[0], short[-1]) == (0.0, 999.0)
    assert short == sorted(set(short))
    assert mean_curve([[1.0, 2.0, 3.0], [3.0, 4.0]]) == [2.0, 3.0]


def curved(lab):
    def arm(level):
        return lambda seed: {"loss": level, "curve": [level + seed, level, level], "step": [1.0, 10.0, 100.0]}

    lab.compare(arms={"method": arm(0.1), "control": arm(1.0)}, main=MAIN, seeds=3)
    return lab


def test_curves_and_points_are_drawn_with_one_line():
    lab = curved(Lab(stem="key"))
    lab.curves("curve", x="step", log="x")
    lab.points("loss")
    assert list(lab.images) == ["key-curve.svg", "key-loss.svg"]
    curves = lab.images["key-curve.svg"].decode()
    assert ">method</text>" in curves
    assert "3 seeds" in curves
    assert ">control</text>" in lab.images["key-loss.svg"].decode()


def test_a_figure_of_what_was_not_compared_is_refused():
    with pytest.raises(ValueError, match=r"call lab\.compare"):
        Lab().curves("curve")
    with pytest.raises(ValueError, match="unknown curve 'curv'"):
        curved(Lab()).curves("curv")
    with pytest.raises(ValueError, match="unknown arm 'metod'"):
        curved(Lab()).curves("curve", arms=["metod"])
    with pytest.raises(ValueError, match="unknown metric 'los'"):
        curved(Lab()).points("los")


def test_each_arm_and_seed_is_announced_on_the_board():
    import io

    from rich.console import Console

    from paperworks.lab.progress import Board

    terminal = io.StringIO()
    seen = []
    with Board([("claim", 1.0)], console=Console(file=terminal, force_terminal=True, width=120)) as board:
        board.begin(0)

        def arm(seed):
            seen.extend(task.description.strip() for task in board._progress.tasks[1:])
            return {"loss": 1.0}

        Lab(board=board).compare(arms={"method": arm, "control": arm}, main=MAIN, seeds=2)
    assert seen == ["method, seed 0", "control, seed 0", "method, seed 1", "control, seed 1"]


def test_a_generator_starts_from_its_seed():
    lab = Lab()
    first, second, third = (torch.rand(3, generator=lab.generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
