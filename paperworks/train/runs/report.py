"""What a run leaves in the hands of its caller."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of `train.fit`.

    steps: optimizer steps of the whole run so far, also those before it was resumed.
    resumed_from: the step this call went on from; 0 when it began.
    losses: the loss of each step of this call, the mean over its elements, without auxiliary losses.
    records: what was logged, as in metrics.jsonl, also before the run was resumed.
    seconds: time spent in training, evaluating and saving, over the whole run.
    counted: tokens (what the loss counts) or items the run has been trained on.
    checkpoints: the complete ones on disk, oldest first.
    stopped: "finished", "on_step" (which asked to stop) or "interrupted".
    """

    steps: int
    resumed_from: int
    losses: list[float] = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)
    seconds: float
    counted: float
    checkpoints: list[Path]
    stopped: str

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records that evaluations left: {"step": ..., "evaluation": {name: value}}."""
        return [record for record in self.records if "evaluation" in record]
