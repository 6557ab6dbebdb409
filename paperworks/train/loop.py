"""The one training loop."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from paperworks.core.modes import evaluating, training
from paperworks.core.processes import tensors_kept_apart
from paperworks.train import evaluation
from paperworks.train.batches import Batches, Source
from paperworks.train.distributed import distribution, sharding
from paperworks.train.objective import Loss
from paperworks.train.optim.parameter_groups import build_optimizer, trainable
from paperworks.train.runs import randomness
from paperworks.train.runs.folder import RunFolder
from paperworks.train.runs.interrupt import Interrupted, StopRequest, deferred_interrupt
from paperworks.train.runs.metrics import Callback, Log
from paperworks.train.runs.progress import Bar
from paperworks.train.runs.report import Report
from paperworks.train.runs.state import State
from paperworks.train.settings import Settings
from paperworks.train.step import Stepper
from paperworks.train.step_log import Diverged, StepResult

# However seldom it is logged, a run reads its losses this often: a step that is not finite is found soon, and on a GPU
# few numbers wait there.
READ_EVERY = 256

Evaluate = Callable[[nn.Module], Mapping[str, float]] | Iterable[Any]


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    settings: Settings | None = None,
    *,
    run_dir: str | Path | None = None,
    optimizer: None = None,
    evaluate: Evaluate | None = None,
    on_step: Callable[[int], bool | None] | None = None,
    callbacks: Iterable[Callback] = (),
    resume: bool = True,
) -> Report:
    """Train `model` in place by gradient descent on `loss` over `batches`, and report.

    loss: loss(model, batch) -> a scalar (the mean of a batch that weighs as much as any other), or (sum, count), such
        as the summed loss of tokens and their number; either followed by a dictionary of metrics, which are means over
        the same elements, or (sum, count) pairs. What parts hand to `nn.auxiliary` is added, weighted by the count.
    batches: any re-iterable (list, DataLoader), an object with state_dict and load_state_dict, or a function
        epoch -> iterable; gone through as often as the steps need. See `train.batches.Source` on resuming.
    run_dir: where metrics.jsonl and checkpoints go; None writes nothing.
    settings: how to train, the optimizer included (`Settings(optimizer=train.AdamW(...))`).
    optimizer: no longer here; `Settings.optimizer` is.
    evaluate: batches to measure `loss` on, or a function model -> {name: value}; the model is in evaluation mode.
    on_step: called after each step with its number, counted from 1; True ends the run there.
    callbacks: each called, in the first process, with every record of the log: {"step", "loss", "lr", "grad_norm",
        "seconds", "tokens" or "items", metrics}, and {"step", "evaluation"}.
    resume: continue from the newest checkpoint in `run_dir`, if any: same weights, bit for bit, as without the break,
        on the same machine with the same number of threads and processes (with another number, up to rounding). False
        refuses a folder that holds one.

    Under `torchrun` every process calls this with the same arguments and the same batches, and computes its share of
    each step (see `train.distribution`); losses, checkpoints and logs are those of one process.

    Raises Diverged when a loss, a gradient or a weight is not finite; ValueError when there is nothing to learn from;
    RuntimeError when another process has ended; Interrupted (a KeyboardInterrupt) after Ctrl-C, when the step is
    finished and saved; OSError when a checkpoint cannot be written. The newest complete checkpoint is whole in every
    case.
    """
    if optimizer is not None:
        raise TypeError("fit(optimizer=...) is Settings(optimizer=...) now, so that a run records its optimizer")
    settings = settings or Settings()
    folder = RunFolder(run_dir) if run_dir is not None else None
    source = Source(batches, recording=folder is not None)
    with ExitStack() as stack:
        device = distribution.place(model, stack.enter_context(distribution.joined(settings.device)))
        _require_trainable(model, loss, settings)
        _require_resumable(source, folder, resume)
        stack.enter_context(training(model))
        stack.enter_context(randomness.deterministic_kernels(settings.deterministic))
        if folder is not None:
            if distribution.is_first():
                stack.enter_context(folder.locked())
                folder.clean()
            distribution.wait()
        distribution.replicate(model)
        if settings.sharded:
            sharding.shard(model, device)
        built = build_optimizer(model, settings)
        called = torch.compile(model) if settings.compile else model
        stepper = Stepper(cast(nn.Module, called), loss, built, settings, device)
        state = State(model, built, stepper.scaler, source, settings)
        run = _Run(model, loss, settings, stepper, state, folder, evaluate, on_step)
        run.begin(callbacks, resume)
        stack.callback(run.end)
        return run.train(stack.enter_context(deferred_interrupt()))


def _require_trainable(model: nn.Module, loss: Loss, settings: Settings) -> None:
    parameters = trainable(model)
    owned = {id(parameter) for parameter in model.parameters()}
    if isinstance(loss, nn.Module):
        own = [name for name, p in loss.named_parameters() if p.requires_grad and id(p) not in owned]
        if own:
            raise ValueError(f"the loss has parameters of its own ({', '.join(own)}): make them part of the model")
    if settings.sharded and settings.precision == "float16":
        raise ValueError("sharded training does not scale losses: use precision='bfloat16', whose range needs no scale")
    if tensors_kept_apart(model) and (settings.sharded or settings.precision == "float16"):
        what, do = ("sharded=True", "leave it False") if settings.sharded else ("precision='float16'", "use 'bfloat16'")
        raise ValueError(
            f"{what} does not go with experts that are spread over processes (ParallelExperts): {do}, or let every "
            "process keep all experts (Experts)"
        )
    if settings.precision == "float16":
        half = [name for name, parameter in parameters.items() if parameter.dtype == torch.float16]
        if half:
            raise ValueError(
                f"precision 'float16' scales gradients and keeps float32 weights, but {half[0]} is float16: "
                "call model.float() first, or train in bfloat16"
            )
    for parameter in parameters.values():
        parameter.grad = None  # one from before would enter the first step


def _require_resumable(source: Source, folder: RunFolder | None, resume: bool) -> None:
    if folder is None:
        return
    if resume and source.one_shot:
        raise ValueError(
            "batches is an iterator, which cannot be gone through again to resume: give a re-iterable, a function "
            "epoch -> iterable, or say resume=False"
        )
    if not resume and folder.complete():
        raise FileExistsError(
            f"{folder.path} holds the checkpoint {folder.complete()[-1].name} of an earlier run, and resume=False: "
            "use another run_dir, or remove this one"
        )


class _Run:
    """One call of `fit`: the order in which steps, logging, evaluation and saving happen."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        settings: Settings,
        stepper: Stepper,
        state: State,
        folder: RunFolder | None,
        evaluate: Evaluate | None,
        on_step: Callable[[int], bool | None] | None,
    ) -> None:
        self.model, self.loss, self.settings, self.stepper, self.state = model, loss, settings, stepper, state
        self.folder, self.evaluate, self.on_step = folder, evaluate, on_step
        self.losses: list[float] = []

    def begin(self, callbacks: Iterable[Callback], resume: bool) -> None:
        """Start the run, or resume it where it was saved."""
        earlier = self.folder.complete() if self.folder is not None and resume else []
        if earlier:
            self.state.resume(earlier[-1])
        elif self.settings.seed is not None:
            randomness.seed(self.settings.seed)
        distribution.wait()  # until all have read: the first one is about to write
        self.resumed_from = self.saved_at = self.state.step
        first = distribution.is_first()
        metrics = self.folder.metrics if self.folder is not None and first else None
        self.log = Log(metrics, self.state.step, callbacks if first else ())
        shown = self.settings.progress if first else False
        self.bar = Bar(shown, self.settings.steps, self.state.step)
        self._began = time.monotonic()

    def end(self) -> None:
        """Close what is open."""
        self.bar.close()
        self.log.close()

    @property
    def seconds(self) -> float:
        """Seconds spent on the whole run."""
        return self.state.seconds + time.monotonic() - self._began

    def train(self, request: StopRequest) -> Report:
        """Take the remaining steps."""
        stopped = "finished"
        while self.state.step < self.settings.steps:
            step = self.state.step + 1
            self.stepper.take(self.state.source, step)
            self.state.step = step
            stop = self.on_step is not None and self.on_step(step) is True
            self._observe(step)
            if distribution.any_process(request.pending):
                self._interrupt()
            if distribution.any_process(stop):
                stopped = "on_step"
                break
        self._read()
        if self.state.step > self.saved_at:
            self._save()
        return self._report(stopped)

    def _observe(self, step: int) -> None:
        """Log, evaluate and save where this step is one to do so."""
        settings = self.settings
        last = step == settings.steps
        if step % settings.log_every == 0 or last:
            self._log(step)
        elif self.bar.due or step % READ_EVERY == 0:
            self._read()
        if self.evaluate is not None and (last or _due(step, settings.evaluate_every)):
            self._evaluate(step)
        if _due(step, settings.save_every):
            self._save()

    def _read(self) -> StepResult | None:
        """Newest of the steps since the last call, whose losses are kept; None if there is none."""
        results = self.stepper.log.read()
        if not results:
            return None
        newest = results[-1]
        self.losses.extend(each.loss for each in results)
        counted = sum(each.elements for each in results)
        self.state.counted += counted
        self.bar.draw(newest.step, newest.loss, self.stepper.rate, counted, self._unit)
        return newest

    @property
    def _unit(self) -> str:
        return "tokens" if self.stepper.counted else "items"

    def _log(self, step: int) -> None:
        newest = self._read()
        assert newest is not None  # this step has not been read before
        numbers = {"loss": newest.loss, "lr": self.stepper.rate, "grad_norm": newest.grad_norm, "seconds": self.seconds}
        self.log.add({"step": step, **numbers, self._unit: self.state.counted, **self.stepper.measured()})

    def _evaluate(self, step: int) -> None:
        self._read()
        with evaluating(self.model), randomness.undisturbed():
            if callable(self.evaluate) and not hasattr(self.evaluate, "__iter__"):
                measured = {name: float(value) for name, value in self.evaluate(self.model).items()}
            else:
                measured = evaluation.evaluate(self.model, self.loss, self.evaluate)  # type: ignore[arg-type]
        self.log.add({"step": step, "evaluation": measured, "seconds": self.seconds})

    def _save(self) -> None:
        self._read()
        self.saved_at = self.state.step
        if self.folder is None:
            return
        try:
            self.state.save(self.folder.checkpoint(self.state.step), self.seconds)
        except (OSError, Diverged) as error:
            complete = self.folder.complete()
            error.add_note(
                f"The last complete checkpoint is {complete[-1] if complete else 'none: this was the first'}"
            )
            raise
        if distribution.is_first():
            self.folder.prune(self.settings.keep)
        distribution.wait()

    def _interrupt(self) -> None:
        self._read()
        if self.state.step > self.saved_at:
            self._save()
        done = f"interrupted after step {self.state.step} of {self.settings.steps}"
        if self.folder is None:
            raise Interrupted(f"{done}; nothing was saved, for there is no run_dir", self._report("interrupted"))
        raise Interrupted(
            f"{done}; saved in {self.folder.checkpoint(self.state.step)}. "
            f"To go on, run the same again with run_dir={str(self.folder.path)!r}",
            self._report("interrupted"),
        )

    def _report(self, stopped: str) -> Report:
        return Report(
            steps=self.state.step,
            resumed_from=self.resumed_from,
            losses=self.losses,
            records=self.log.records,
            seconds=self.seconds,
            counted=self.state.counted,
            checkpoints=self.folder.complete() if self.folder is not None else [],
            stopped=stopped,
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
