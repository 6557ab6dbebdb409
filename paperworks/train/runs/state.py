"""State of a run: what a checkpoint captures, and a resumed run restores."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paperworks.core.errors import CorruptFile
from paperworks.train.batches import Source
from paperworks.train.distributed import distribution, sharding
from paperworks.train.runs import checkpoint, randomness
from paperworks.train.runs.weights import Weights
from paperworks.train.settings import Settings, differences, rates_digest
from paperworks.train.step_log import Diverged

# Entries of a group that are not settings of the optimizer: its parameters and their rate at this step.
_TRANSIENT = frozenset({"params", "param_names", "lr", "initial_lr"})


class State:
    """The parts of a run that change as it goes, and the numbers that count it.

    step: optimizer steps taken. seconds: time spent until the run was resumed. counted: tokens or items seen.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, source: Source, settings: Settings
    ) -> None:
        self.model, self.optimizer, self.scaler, self.source, self.settings = model, optimizer, scaler, source, settings
        self.step = 0
        self.seconds = 0.0
        self.counted = 0.0
        self._rates, self._rates_until = 0, 0
        self._groups = _described(optimizer)
        self._weights = Weights(model)
        self._rank_local = self._weights.rank_local
        self._own_names = self._names()
        self._all_names = [self._rank_local.in_order(group) for group in self._own_names]

    def save(self, folder: Path, seconds: float) -> None:
        """Write a checkpoint. Raises Diverged rather than write weights that are not finite."""
        if broken := self._weights.first_not_finite():
            raise Diverged(f"after step {self.step} the weight {broken} is not finite; it was not saved")
        self._rates = rates_digest(self.settings, self.step, self._rates_until, self._rates)
        self._rates_until = self.step
        tensors, manifest = self._weights.capture()
        state = {
            "step": self.step,
            "seconds": seconds,
            "counted": self.counted,
            "settings": self.settings.described(),
            "rates": self._rates,
            "weights": manifest,
            "optimizer": self._optimizer_identity() | {"state": self._optimizer_state()},
            "scaler": self.scaler.state_dict(),
            "batches": self.source.state(),
            "random": randomness.to_json(randomness.capture()),
            "torch": torch.__version__,
        }
        if distribution.is_first():
            checkpoint.write(folder, tensors, state)

    def resume(self, folder: Path) -> None:
        """Restore the state saved in `folder`. Raises ValueError that lists how that run differs from this one."""
        saved = checkpoint.read_state(folder)
        try:
            found = differences(saved["settings"], saved["rates"], saved["step"], self.settings)
            found += self._weights.differences(saved["weights"]) + self._optimizer_differences(saved["optimizer"])
            if found:
                listing = "".join(f"\n  - {each}" for each in found)
                raise ValueError(
                    f"this run differs from the one saved in {folder} and cannot go on from it:{listing}\n"
                    "Make them equal, or train in another run_dir"
                )
            self._restore(saved, folder)
        except (KeyError, TypeError, IndexError) as error:
            raise CorruptFile(f"{folder} does not hold what a checkpoint must: {error!r}") from error

    def _restore(self, saved: dict[str, Any], folder: Path) -> None:
        self._weights.restore(checkpoint.read_weights(folder), saved["weights"])
        optimizer = saved["optimizer"]
        self._restore_optimizer(self._rank_local.own_optimizer(optimizer["state"], optimizer["names"], self._own_names))
        self.scaler.load_state_dict(saved["scaler"])
        self.source.restore(saved["batches"])
        self.step, self.seconds, self.counted = saved["step"], saved["seconds"], saved["counted"]
        self._rates, self._rates_until = saved["rates"], saved["step"]
        randomness.restore(randomness.from_json(saved["random"]))  # last: going to the batches' place draws too

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, entries in saved["state"].items():
            parameter = parameters[index]
            restored = self.optimizer.state[parameter]
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    restored[name] = _laid_out(sharding.like(restored[name], parameter), parameter)
                    value = sharding.like(value, parameter)
                # Torch casts an optimizer's state to the dtype of the weight; one kept wider on purpose stays so.
                if isinstance(value, Tensor) and restored[name].dtype != value.dtype:
                    restored[name] = value.to(restored[name].device)

    def _optimizer_identity(self) -> dict[str, Any]:
        kind = type(self.optimizer)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": self._groups, "names": self._all_names}

    def _optimizer_state(self) -> Any:
        state = _whole(self.optimizer.state_dict())
        return self._rank_local.whole_optimizer(state, self._own_names, keep=distribution.is_first())

    def _names(self) -> list[list[str]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names[id(parameter)] for parameter in group["params"]] for group in self.optimizer.param_groups]

    def _optimizer_differences(self, saved: dict[str, Any]) -> list[str]:
        now = self._optimizer_identity()
        found = []
        if saved["class"] != now["class"]:
            found.append(f"optimizer: was {saved['class']}, now {now['class']}")
        elif len(saved["groups"]) != len(now["groups"]):
            found.append(f"optimizer: had {len(saved['groups'])} parameter groups, now {len(now['groups'])}")
        else:
            for index, (before, after) in enumerate(zip(saved["groups"], now["groups"], strict=True)):
                for key in sorted(before.keys() | after.keys()):
                    if before.get(key) != after.get(key):
                        found.append(f"optimizer group {index}, {key}: was {before.get(key)}, now {after.get(key)}")
        return found + _moved(saved["names"], now["names"])


def _whole(tree: Any) -> Any:
    """Tree with whole tensors in place of sharded ones."""
    if isinstance(tree, dict):
        return {name: _whole(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_whole(value) for value in tree)
    return sharding.whole(tree) if isinstance(tree, Tensor) else tree


def _laid_out(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The tensor with the strides of `pattern`, which optimizers give their state; a file holds rows in order.

    Kernels may take another path, with another rounding, where strides differ.
    """
    if sharding.is_sharded(tensor) or tensor.stride() == pattern.stride():
        return tensor
    return torch.empty_like(pattern, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _described(optimizer: Optimizer) -> list[dict[str, str]]:
    return [{key: repr(group[key]) for key in group if key not in _TRANSIENT} for group in optimizer.param_groups]


def _moved(before: list[list[str]], after: list[list[str]]) -> list[str]:
    """Parameters that an optimizer holds in another group, no longer, or newly; one sentence each."""
    was = {name: index for index, names in enumerate(before) for name in names}
    now = {name: index for index, names in enumerate(after) for name in names}
    found = [
        f"optimizer: {name} was in group {was[name]}, now {_group(now, name)}"
        for name in was
        if was[name] != now.get(name)
    ]
    found += [f"optimizer: {name} is new, in group {now[name]}" for name in now if name not in was]
    if not found and before != after:
        found.append("optimizer: the same parameters, but in another order")
    return found


def _group(groups: dict[str, int], name: str) -> str:
    return f"in group {groups[name]}" if name in groups else "is not optimized"
