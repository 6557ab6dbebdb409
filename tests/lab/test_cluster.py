import os
import sys

import pytest

from paperworks.lab import cluster


def squared(number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number**2, os.getpid()


def test_map_gives_results_in_the_order_of_the_items_from_other_processes():
    results = cluster.map(squared, [3, 1, 2])
    assert [square for square, _ in results] == [9, 1, 4]
    assert os.getpid() not in {process for _, process in results}


def test_map_raises_the_error_of_a_call():
    with pytest.raises(ValueError, match="-1 is negative"):
        cluster.map(squared, [1, -1])


def test_an_error_of_one_item_leaves_the_others():
    outcomes = dict(cluster.completed(squared, [2, -1]))
    assert outcomes[2][0] == 4
    assert isinstance(outcomes[-1], ValueError)


def test_items_are_taken_only_when_cores_are_free(monkeypatch):
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 1)
    taken = []

    def items():
        for number in range(3):
            taken.append(number)
            yield number

    outcomes = cluster.completed(squared, items())
    next(outcomes)
    assert taken == [0]
    outcomes.close()
    assert taken == [0]


def test_a_cluster_without_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'ray is not installed.*pip install "paperworks\[sweep\]"'):
        cluster.map(squared, [1], "auto")


class FakeRay:
    """The part of Ray that is used: two cores, tasks that run when they are waited for."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self):
        self.address, self.cancelled, self.tasks = None, [], {}

    def is_initialized(self):
        return self.address is not None

    def init(self, address, **options):
        self.address = address

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **options):
        def decorate(function):
            class Task:
                @staticmethod
                def remote(item):
                    reference = object()
                    self.tasks[reference] = (function, item)
                    return reference

            return Task

        return decorate

    def wait(self, references, num_returns):
        return references[-1:], references[:-1]

    def get(self, reference):
        function, item = self.tasks[reference]
        try:
            return function(item)
        except ValueError as cause:
            error = self.exceptions.RayError("task failed")
            error.cause = cause
            raise error from cause

    def cancel(self, reference, force):
        self.cancelled.append(reference)


def test_ray_runs_the_same_calls(monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert [square for square, _ in cluster.map(squared, [3, 1, 2], "ray://head:10001")] == [9, 1, 4]
    assert ray.address == "ray://head:10001"
    with pytest.raises(ValueError, match="-1 is negative"):
        cluster.map(squared, [-1], "auto")
    outcomes = cluster.completed(squared, [1, 2, 3], "auto")
    next(outcomes)
    outcomes.close()
    assert len(ray.cancelled) == 1  # two run at once, one of them is done
