"""Expert parallelism (Shazeer et al. 2017, Section 3.1; Lepikhin et al. 2020, arXiv:2006.16668): tokens travel.

Each of p processes has its own rows and count / p of the experts. A token goes to the processes of its experts and
comes back with their outputs: two exchanges of all with all (all-to-all), and two more for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.core import processes
from paperworks.nn.feedforward.experts.mixture import Experts, ExpertsModule
from paperworks.nn.feedforward.mlp import Feedforward


@dataclass(frozen=True, kw_only=True)
class ParallelExperts(Experts):
    """`Experts` spread over the processes of the default group: of p, process r keeps experts r n/p to (r+1) n/p - 1.

    Join the processes (`torch.distributed.init_process_group`, or `paperworks.train.joined`) before the model is built;
    alone it is `Experts`. Router and shared experts are in every process. Weights are drawn and named
    as those of `Experts`, so a state of either loads into the other's module, and each process takes its share.

    All processes run the model together, each on rows of its own. Capacity and the losses of the router are those of
    the rows here, or, inside `processes.one_batch()` (as `train.fit` does where it shares out a batch), of the rows of
    all: the same outputs and gradients then as in one process, but for what is drawn (noise, jitter, as dropout is).

    Raises ValueError, when built, where the processes do not divide `count`.
    """

    @staticmethod
    def of(experts: Experts) -> ParallelExperts:
        """The same mixture, its experts spread."""
        return ParallelExperts(**{field.name: getattr(experts, field.name) for field in fields(experts)})

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers, with this process's experts."""
        workers = processes.count()
        if self.count % workers:
            raise ValueError(
                f"ParallelExperts.count is {self.count}, which {workers} processes cannot share evenly: start a number "
                f"of processes that divides it, or use Experts, which every process keeps whole"
            )
        return ParallelExpertsModule(dim, self)


class Elsewhere(nn.Module):
    """Stands for an expert that another process keeps: it has no weights, and takes none from a state."""

    def __init__(self, spec: Feedforward, dim: int) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim

    def stand_in(self) -> nn.Module:
        """An expert with memory but no values: who draws for it draws what its own process draws."""
        with torch.device("meta"):
            empty = self.spec.build(self.dim)
        return empty.to_empty(device=torch.get_default_device())

    def _load_from_state_dict(self, *args: Any) -> None:
        """Leave the expert's weights to its own process."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse: tokens must travel."""
        raise RuntimeError("this expert is kept by another process: call the layer, which sends tokens there")


class ParallelExpertsModule(ExpertsModule):
    """The module of `ParallelExperts`; `experts.i` is an `Elsewhere` where another process keeps expert i."""

    def _build_experts(self, dim: int) -> nn.ModuleList:
        spec = self.spec
        self.workers = processes.count()
        self.own = spec.count // self.workers
        self.first = self.own * processes.rank()
        experts = nn.ModuleList()
        for index in range(spec.count):
            expert = spec.expert.build(dim)  # also the others', so that the same numbers are drawn everywhere
            experts.append(expert if index in self._range else Elsewhere(spec.expert, dim))
        return processes.kept_apart(experts) if self.workers > 1 else experts

    @property
    def _range(self) -> range:
        return range(self.first, self.first + self.own)

    def _experts_here(self) -> Sequence[nn.Module]:
        return [self.experts[index] for index in self._range]

    def _work(self, inputs: Tensor, counts: Tensor) -> Tensor:
        """Send the tokens, which are sorted by expert and so by process, let the experts here work, send them back."""
        if processes.count() != self.workers:
            raise ValueError(
                f"these experts were built in {self.workers} processes and now there are {processes.count()}: join the "
                "processes before the model is built (torch.distributed.init_process_group, or "
                "paperworks.train.distributed.distribution.joined)"
            )
        if self.workers == 1:
            return super()._work(inputs, counts)
        sending = counts.to(inputs.device).view(self.workers, self.own)
        coming = processes.counts_exchanged(sending)
        sent, received = sending.sum(1).tolist(), coming.sum(1).tolist()
        arrived = processes.exchanged(inputs, sent, received)
        # They lie by process and then by expert; each expert works on its own in one piece.
        expert = torch.arange(self.own, device=coming.device).repeat(self.workers).repeat_interleave(coming.flatten())
        order = torch.argsort(expert, stable=True)
        done = super()._work(arrived[order], coming.sum(0))
        return processes.exchanged(done.to(inputs.dtype)[order.argsort()], received, sent)

    def _unused(self, expert: nn.Module, part: Tensor) -> Tensor:
        """Nothing that yet depends on the expert: every process must take part in the way back."""
        return self._nothing(expert, part) if torch.is_grad_enabled() else part
