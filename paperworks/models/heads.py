"""A language model with a linear head on its last token: fine-tuning as in GPT (Radford et al. 2018, Section 3.2)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.models.decoder import DecoderModel
from paperworks.models.encoder import pool
from paperworks.nn.placement import Placement

Reading = Literal["one", "sum", "choice"]


class TaskLogits(NamedTuple):
    """What a task model says: `task` (batch, classes or choices), and `language` (batch * sequences, time, vocab)."""

    task: Float[Tensor, "batch classes"]
    language: Float[Tensor, "rows time vocab"] | None


class TaskModel(nn.Module):
    """h of each sequence's last token (the extract token) through one linear layer.

    Args:
        model: a decoder; it stays the module `model`, so adapters and checkpoints find it.
        classes: what there is to choose from; ignored for "choice", where each sequence gets one score.
        reading: "one" sequence an example; "sum": the h of all its sequences added before the head, as for the two
            orders of a pair of texts, so that their order cannot matter; "choice": one sequence for each answer.
        dropout: before the head (0.1 in the paper).

    Raises ValueError for an unknown reading or fewer than 2 classes.
    """

    def __init__(
        self, model: DecoderModel, classes: int = 2, *, reading: Reading = "one", dropout: float = 0.1
    ) -> None:
        super().__init__()
        if reading not in get_args(Reading):
            raise ValueError(unknown("reading", str(reading), get_args(Reading)))
        if reading != "choice" and classes < 2:
            raise ValueError(f"there must be at least 2 classes to choose from, got {classes}")
        self.model, self.reading = model, reading
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(model.spec.dim, 1 if reading == "choice" else classes)
        with torch.no_grad():
            self.head.weight.normal_(0.0, model.spec.init_std)
            self.head.bias.zero_()
        self.head.to(model.device, model.dtype)

    def forward(
        self,
        tokens: Int[Tensor, "batch sequences time"],
        segments: Int[Tensor, "batch sequences time"] | None = None,
        *,
        language: bool = False,
    ) -> TaskLogits:
        """The logits of the classes, and those of the next tokens if `language`.

        Args:
            tokens: the sequences of each example; segments: 0 at padding, which must stand after the tokens.

        Raises ValueError for another number of dimensions, or several sequences where one is read.
        """
        if tokens.dim() != 3 or (self.reading == "one" and tokens.shape[1] != 1):
            raise ValueError(
                f"tokens must be (batch, sequences, time), one sequence for reading 'one'; got {tuple(tokens.shape)}"
            )
        rows = tokens.flatten(0, 1)
        real = None if segments is None else segments.flatten(0, 1)
        hidden = self.model.hidden(rows, Placement(segments=real))
        last = pool(hidden, real, "last").unflatten(0, tokens.shape[:2])
        if self.reading == "choice":
            scores = self.head(self.dropout(last))[..., 0]
        else:
            scores = self.head(self.dropout(last.sum(1)))
        return TaskLogits(scores, self.model.logits(hidden) if language else None)
