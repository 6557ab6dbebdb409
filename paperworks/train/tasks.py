"""The loss of a task with language modelling beside it (Radford et al. 2018, equation 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from paperworks.train.evaluation import evaluate
from paperworks.train.losses import IGNORED, next_targets
from paperworks.train.objective import Loss


def task_loss(auxiliary: float = 0.5) -> Loss:
    """Loss mean(-log p(label)) + auxiliary * mean(-log p(next token)), for `models.task.TaskModel`.

    The batch is a mapping of "tokens", "segments" (batch, sequences, time) and "labels" (batch,), as
    `data.task_inputs.task_batch` makes it. Metrics: "accuracy", and both losses.
    Raises ValueError for a negative weight.
    """
    if auxiliary < 0:
        raise ValueError(f"the weight of the auxiliary loss must be at least 0, got {auxiliary}")

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        said = model(batch["tokens"], batch["segments"], language=auxiliary > 0)
        task = functional.cross_entropy(said.task, batch["labels"])
        right = (said.task.argmax(-1) == batch["labels"]).sum()
        metrics: dict[str, Any] = {"task": task, "accuracy": (right, len(batch["labels"]))}
        if said.language is None:
            return task, metrics
        rows, segments = batch["tokens"].flatten(0, 1), batch["segments"].flatten(0, 1)
        wanted = next_targets(rows, None, segments)
        language = functional.cross_entropy(said.language.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        return task + auxiliary * language, {**metrics, "language": language}

    return loss


def task_accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of examples whose likeliest class (or choice) is the label."""
    return evaluate(model, task_loss(0.0), batches)["accuracy"]
