"""Where the batches come from, and the place in them from which a resumed run goes on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from paperworks.train.runs import randomness

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


@runtime_checkable
class Stateful(Protocol):
    """Batches that know their own place, such as torchdata's `StatefulDataLoader`."""

    def state_dict(self) -> Any:
        """Place as nested tensors, numbers, strings, lists, tuples and dictionaries."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Go to the place: the next `iter` continues there."""
        ...


class Source:
    """Batch after batch, epoch after epoch, with a place that can be saved.

    Batches with `state_dict` keep their own place. Others are gone through again from the start of the epoch, with
    the generators (python, numpy, torch, and those of a DataLoader and its samplers) as they were there, and what was
    consumed is skipped. This restores every order that depends on those generators only, with DataLoader workers too.
    It cannot restore what lives elsewhere: the generators inside persistent workers, a dataset that remembers
    earlier epochs, a stream that does not repeat itself. An iterator (`iter(batches) is batches`) has no start.

    epoch: which passage through the batches this is, from 0; a callable is called with it.
    position: batches of this epoch consumed so far.
    """

    def __init__(self, batches: Batches, recording: bool) -> None:
        self.batches = batches
        self.epoch = 0
        self.position = 0
        self.stateful = isinstance(batches, Stateful)
        # A list draws nothing, and the epochs of toy runs are as short as one batch.
        self._recording = recording and not self.stateful and not isinstance(batches, list | tuple)
        self._iterator: Iterator[Any] | None = None
        self._began: tuple[randomness.States, list[torch.Tensor]] | None = None
        if not callable(batches) and not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise TypeError(
                f"batches is {type(batches).__name__}; an iterable, or a function epoch -> iterable, is needed"
            )

    @property
    def one_shot(self) -> bool:
        """Whether the batches can be gone through only once."""
        return isinstance(self.batches, Iterator) and not self.stateful

    def next(self) -> Any:
        """Next batch, of the next epoch if this one is over.

        Raises ValueError when an epoch has no batch, or when an iterator has run out.
        """
        if self._iterator is None:
            self._begin()
        while True:
            assert self._iterator is not None
            for batch in self._iterator:
                self.position += 1
                return batch
            if self.one_shot:
                raise ValueError(
                    f"the iterator of batches ran out after {self.position}; the settings ask for more steps: "
                    "give a re-iterable (list, DataLoader), a function epoch -> iterable, or fewer steps"
                )
            if self.position == 0:
                raise ValueError(f"batches is empty: epoch {self.epoch} yielded nothing")
            self.epoch, self.position = self.epoch + 1, 0
            self._begin()

    def _begin(self) -> None:
        if self._recording:
            self._began = (randomness.capture(), [generator.get_state() for generator in self._generators()])
        for part in self._parts():
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        batches = self.batches
        iterable = batches if hasattr(batches, "__iter__") or not callable(batches) else batches(self.epoch)
        self._iterator = iter(iterable)

    def _parts(self) -> list[Any]:
        if isinstance(self.batches, list | tuple):
            return []
        parts = [self.batches, getattr(self.batches, "sampler", None)]
        inner = getattr(self.batches, "batch_sampler", None)
        return [part for part in [*parts, inner, getattr(inner, "sampler", None)] if part is not None]

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in self._parts()]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def state(self) -> dict[str, Any]:
        """Place as nested JSON values and tensors."""
        place: dict[str, Any] = {"epoch": self.epoch, "position": self.position, "stateful": self.stateful}
        if isinstance(self.batches, Stateful):
            place["own"] = self.batches.state_dict()
        elif self._began is not None:
            place["began"] = {"random": randomness.to_json(self._began[0]), "generators": self._began[1]}
            place["generators"] = [generator.get_state() for generator in self._generators()]
        return place

    def restore(self, place: dict[str, Any]) -> None:
        """Go to a saved place. Leaves the global generators anywhere: put them back afterwards.

        Raises ValueError when these batches cannot be those the place was saved from.
        """
        if place["stateful"] != self.stateful:
            kinds = {True: "knew their own place (state_dict)", False: "had no state_dict"}
            raise ValueError(f"the batches of the saved run {kinds[place['stateful']]}, these are of the other kind")
        self.epoch, self.position = place["epoch"], place["position"]
        if isinstance(self.batches, Stateful):
            self.batches.load_state_dict(place["own"])
            self._begin()
            return
        generators = self._generators()
        if "began" in place:
            self._require_generators(len(place["generators"]))
            randomness.restore(randomness.from_json(place["began"]["random"]))
            for generator, state in zip(generators, place["began"]["generators"], strict=True):
                generator.set_state(state)
        self._begin()
        self._skip(place["position"])
        for generator, state in zip(generators, place.get("generators", []), strict="began" in place):
            generator.set_state(state)

    def _require_generators(self, saved: int) -> None:
        if len(self._generators()) != saved:
            raise ValueError(
                f"the batches of the saved run drew from {saved} generators of their own, these from "
                f"{len(self._generators())}: make the DataLoader the same way, with or without generator="
            )

    def _skip(self, count: int) -> None:
        assert self._iterator is not None
        for skipped in range(count):
            if next(self._iterator, _END) is _END:
                raise ValueError(
                    f"the saved run had consumed {count} batches of epoch {self.epoch}; now it has only {skipped}"
                )


_END = object()
