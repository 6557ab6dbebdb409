"""A model's state as a checkpoint holds it: all of it, or, where parts are frozen, what training can have changed."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.train.distributed import distribution, sharding
from paperworks.train.distributed.rank_local import RankLocalState
from paperworks.train.runs import trees


class Weights:
    """The state of one model, with a fingerprint of what is frozen in it.

    When some parameters are frozen (an adapter on a large base), everything in the state that is not trained and is
    unchanged since training began is left out of checkpoints, and only its fingerprint is kept: a resumed run must
    start from the same base, and that is checked. Without frozen parameters checkpoints hold the whole state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rank_local = RankLocalState(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        partly = any(not parameter.requires_grad for parameter in named.values())
        self.trained = {name for name, parameter in named.items() if parameter.requires_grad}
        self.at_start: dict[str, int] = {}
        if partly:
            others = {name: t for name, t in self._tensors().items() if name not in self.trained}
            self.at_start = {name: fingerprint(tensor) for name, tensor in others.items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}

    def first_not_finite(self) -> str | None:
        """Name of the first trained parameter with a value that is not finite."""
        found = None
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(sharding.local(parameter)).all():
                found = name
                break
        if distribution.any_process(found is not None):
            return found or "(one that another process holds)"
        return None

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors to write, and the manifest from which `restore` puts the state together again.

        Rank-local tensors of all processes reach only the first one, which writes.
        """
        stored: dict[str, Tensor] = {}
        manifest: dict[str, Any] = {"stored": {}, "aliases": {}, "left_out": {}, "others": {}}
        first: dict[Any, str] = {}
        for name, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                manifest["others"][name] = trees.flatten(value, name, stored)
                continue
            pointer = sharding.local(value).data_ptr()
            same = (pointer, value.shape, value.stride(), value.dtype) if value.numel() else name
            if name in self.at_start and fingerprint(value) == self.at_start[name]:
                manifest["left_out"][name] = [*_kind(value), self.at_start[name]]
            elif same in first:
                manifest["aliases"][name] = first[same]
            else:
                first[same] = name
                stored[name] = sharding.whole(value)
                manifest["stored"][name] = _kind(value)
        return self.rank_local.whole(stored, keep=distribution.is_first()), self.rank_local.whole_manifest(manifest)

    def differences(self, manifest: dict[str, Any]) -> list[str]:
        """Differences between this model and the one the manifest was captured from, one sentence each."""
        saved = dict(manifest["stored"])
        saved |= {name: saved[first] for name, first in manifest["aliases"].items()}
        saved |= {name: kind[:2] for name, kind in manifest["left_out"].items()}
        saved = {name: kind for name, kind in saved.items() if name not in self.rank_local.held_elsewhere}
        now = {name: _kind(tensor) for name, tensor in self._tensors().items()}
        found = [f"weight {name}: was {_said(saved[name])}, is missing now" for name in saved if name not in now]
        found += [f"weight {name}: is new, {_said(now[name])}" for name in now if name not in saved]
        for name in saved:
            if name in now and saved[name] != now[name]:
                found.append(f"weight {name}: was {_said(saved[name])}, now {_said(now[name])}")
        for name, kind in manifest["left_out"].items():
            if name in self.rank_local.held_elsewhere:
                continue
            if name in self.trained:
                found.append(f"weight {name}: was frozen, is trained now")
            elif now.get(name) == kind[:2] and self._fingerprint_now(name) != kind[2]:
                found.append(f"weight {name}: is frozen, but its values are not those the run began with")
        return self.rank_local.combined(found)

    def _fingerprint_now(self, name: str) -> int:
        return self.at_start[name] if name in self.at_start else fingerprint(self._tensors()[name])

    def restore(self, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Put the saved state into the model, whose `differences` must have been found empty."""
        now = self._tensors()
        here = [name for name in manifest["stored"] if name in now]
        state: dict[str, Any] = {name: sharding.like(tensors[name], now[name]) for name in here}
        state |= {name: state[first] for name, first in manifest["aliases"].items() if name in now}
        state |= {name: trees.unflatten(tree, tensors) for name, tree in manifest["others"].items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        lost = [name for name in missing if name not in manifest["left_out"]] + list(unexpected)
        if lost:
            raise ValueError(f"the model did not take its saved state back; its load_state_dict left {', '.join(lost)}")


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _said(kind: list[Any]) -> str:
    return f"{kind[0]} {tuple(kind[1])}"


def fingerprint(tensor: Tensor) -> int:
    """Checksum of the bytes of a tensor."""
    return zlib.crc32(sharding.whole(tensor.detach()).to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
