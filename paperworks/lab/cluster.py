"""One function over many items: on processes of this machine, or as tasks of a Ray cluster (extra `sweep`)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map(function: Callable[[T], R], items: Iterable[T], address: str | None = None, *, cpus: int = 1) -> list[R]:
    """Results of a function for each item, in the order of the items: a parameter sweep.

    Args:
        function: defined at the top level of a module, so that other processes can import it.
        items: its arguments; function and items must pickle.
        address: None for processes on this machine; else the address of a Ray cluster, such as "auto",
            "ray://head:10001", or "local" for one that is started here.
        cpus: cores each call uses.

    Raises the first error of a call, or ValueError where Ray is asked for and not installed.
    """
    listed = list(items)
    results: dict[int, R] = {}
    for number, outcome in completed(_Numbered(function), enumerate(listed), address, cpus=cpus):
        if isinstance(outcome, Exception):
            raise outcome
        results[number[0]] = outcome
    return [results[number] for number in range(len(listed))]


class _Numbered:
    """Calls a function on the second part of (number, item)."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, numbered: tuple[int, Any]) -> Any:
        return self.function(numbered[1])


def completed(
    function: Callable[[T], R], items: Iterable[T], address: str | None = None, *, cpus: int = 1
) -> Iterator[tuple[T, R | Exception]]:
    """Pairs of an item and its result, or the exception it raised, as they complete; see `map` for the arguments.

    The next item is taken only when cores are free, so an iterator of items may stop in the meantime. Closing this
    iterator, or an interrupt, leaves the items that wait undone.
    """
    if address is None:
        return _on_processes(function, items, cpus)
    return _on_ray(function, items, address, cpus)


def _on_processes(function: Callable[[T], R], items: Iterable[T], cpus: int) -> Iterator[tuple[T, R | Exception]]:
    workers = max(1, (os.cpu_count() or 1) // cpus)
    waiting = iter(items)
    # Spawned and not forked: a fork of a process in which torch has threads can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[R], T] = {}
        try:
            while True:
                for item in islice(waiting, workers - len(running)):
                    running[pool.submit(function, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield item, (future.result() if error is None else error)
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(
    function: Callable[[T], R], items: Iterable[T], address: str, cpus: int
) -> Iterator[tuple[T, R | Exception]]:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f'ray is not installed, so nothing can run on the cluster {address!r}; pip install "paperworks[sweep]"'
        ) from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    task = ray.remote(num_cpus=cpus)(lambda item: function(item))
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
    waiting = iter(items)
    running: dict[Any, T] = {}
    try:
        while True:
            for item in islice(waiting, workers - len(running)):
                running[task.remote(item)] = item
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            item = running.pop(done[0])
            try:
                yield item, ray.get(done[0])
            except ray.exceptions.RayError as error:  # of the task (its own error is the cause) or of the cluster
                cause = getattr(error, "cause", None)
                yield item, cause if isinstance(cause, Exception) else error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
