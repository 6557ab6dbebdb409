import pytest

from paperworks.lab.stopwatch import Stopwatch


@pytest.mark.parametrize(
    ("wall", "processor", "seconds"),
    [
        (10.0, 10.0, 10.0),
        (10.0, 19.0, 10.0),  # two threads at once
        (30.0, 10.0, 10.0),  # other programs had two thirds of the processor
    ],
)
def test_waiting_for_the_processor_does_not_count(monkeypatch, wall, processor, seconds):
    times = iter([(100.0, 5.0), (100.0 + wall, 5.0 + processor)])
    monkeypatch.setattr("paperworks.lab.stopwatch.now", lambda: next(times))
    assert Stopwatch().seconds() == pytest.approx(seconds)


def test_the_stopwatch_counts_work():
    watch = Stopwatch()
    while watch.seconds() < 0.05:
        sum(range(1000))
    assert watch.seconds() < 5.0
