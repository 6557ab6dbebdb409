"""LoRRA: adapters trained so that a model represents a text as it would under an instruction (Zou et al. 2023).

Low-rank representation adaptation, arXiv:2310.01405. The targets and the loss stand here; the adapter is any that can
be switched off (`adapt.LoRA`), the loop is `train.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.interpret.steering.vectors import ControlVector
from paperworks.interpret.taps import record

Disabled = Callable[[nn.Module], AbstractContextManager[object]]
Run = Callable[[nn.Module, Tensor], object]


@dataclass(frozen=True)
class LorraBatch:
    """Texts alone and under opposite instructions; the rows of each side have one length, so nothing is padded.

    The response ends every row; `response` marks, among the last `response.shape[1]` tokens, those that count.
    """

    plain: Int[Tensor, "batch time"]
    positive: Int[Tensor, "batch time_positive"]
    negative: Int[Tensor, "batch time_negative"]
    response: Bool[Tensor, "batch window"]

    def __post_init__(self) -> None:
        window = self.response.shape[-1]
        for name in ("plain", "positive", "negative"):
            rows = getattr(self, name)
            if rows.dim() != 2 or len(rows) != len(self.response) or rows.shape[1] < window:
                raise ValueError(
                    f"LorraBatch.{name} must be (batch, time) with {len(self.response)} rows of at least the window's "
                    f"{window} tokens, got {tuple(rows.shape)}"
                )

    def __len__(self) -> int:
        return len(self.plain)


def lorra_loss(
    states: Mapping[str, Float[Tensor, "batch window dim"]],
    targets: Mapping[str, Float[Tensor, "batch window dim"]],
    response: Bool[Tensor, "batch window"],
) -> Float[Tensor, ""]:
    """The mean over layers, rows and the window of ||R - R_target||_2, masked tokens counting as 0.

    The norm is not squared, and the mean counts masked places too, as in the authors' code.
    """
    if states.keys() != targets.keys() or not states:
        raise ValueError(f"states and targets need the same layers, got {sorted(states)} and {sorted(targets)}")
    apart = torch.stack([states[path] - targets[path] for path in states]).square().sum(-1)
    # The root of 0 has no finite gradient: the distance of a state that is on its target is 0, and stays there.
    distance = torch.where(apart > 0, apart.clamp_min(torch.finfo(apart.dtype).tiny).sqrt(), 0.0)
    return (distance * response).mean()


class Lorra:
    """loss(model, batch) for `train.fit`: R_target = R(x) + alpha (R(T+(x)) - R(T-(x))) + beta r.

    All of it is of the frozen model. The difference is the contrast vector of these tokens, r a reading vector.

    Args:
        layers: module paths of the target layers. Only adapters at or before them learn anything.
        alpha: how many times the difference that the instruction makes; the authors use 5. With 0 both instructed
            sides are left alone.
        beta, reading: how many times which reading vector of each layer is added; the authors use none.
        disabled: switches the adapters off, `adapt.disabled`; targets are those of the model without them.
        run: runs the model on tokens, model(tokens) by default; model.hidden(tokens) of ours spares the logits.
    """

    def __init__(
        self,
        layers: Sequence[str],
        alpha: float = 5.0,
        beta: float = 0.0,
        reading: ControlVector | None = None,
        *,
        disabled: Disabled,
        run: Run | None = None,
    ) -> None:
        if not layers:
            raise ValueError("LoRRA needs at least one target layer, such as 'blocks.10'")
        missing = [path for path in layers if reading is not None and path not in reading.directions]
        if missing or (beta != 0 and reading is None):
            raise ValueError(f"beta is {beta:g}, but there is no reading vector for {', '.join(missing or layers)}")
        self.layers, self.alpha, self.beta, self.reading = list(layers), alpha, beta, reading
        self.disabled = disabled
        self.run: Run = run if run is not None else lambda model, tokens: model(tokens)

    def _window(
        self, model: nn.Module, tokens: Tensor, window: int, *, detach: bool = True
    ) -> dict[str, Float[Tensor, "batch window dim"]]:
        """The states of the last tokens after each target layer."""
        with record(model, self.layers, detach=detach) as seen:
            self.run(model, tokens)
        return {path: value[:, -window:] for path, value in seen.items()}

    @torch.no_grad()
    def targets(self, model: nn.Module, batch: LorraBatch) -> dict[str, Float[Tensor, "batch window dim"]]:
        """Where the states of the response are to go."""
        window = batch.response.shape[1]
        with self.disabled(model):
            found = self._window(model, batch.plain, window)
            if self.alpha != 0:
                more = self._window(model, batch.positive, window)
                less = self._window(model, batch.negative, window)
                found = {path: found[path] + self.alpha * (more[path] - less[path]) for path in found}
        if self.reading is not None:
            found = {path: value + self.beta * self.reading.directions[path].to(value) for path, value in found.items()}
        return found

    def __call__(self, model: nn.Module, batch: LorraBatch) -> Float[Tensor, ""]:
        """The loss of the adapted model on a batch."""
        targets = self.targets(model, batch)
        states = self._window(model, batch.plain, batch.response.shape[1], detach=False)
        return lorra_loss(states, targets, batch.response)
