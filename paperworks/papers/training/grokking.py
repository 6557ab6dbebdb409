"""Grokking: a network that has long memorised its training set suddenly generalises.

The small scale is a one-hidden-layer network on addition modulo 59, full batch: the same effect as the paper's
transformer on modulo 97, within a minute of one core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds.algorithmic import OPERATIONS, Table, inverse, operation_table

paper = Paper(
    key="grokking",
    title="Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets",
    authors="Power, Burda, Edwards, Babuschkin, Misra",
    year=2022,
    ref="arXiv:2201.02177",
    family="training",
    summary=(
        "On tables of binary operations a network first memorises the equations it was shown and, long after its "
        "training accuracy is perfect, suddenly learns the rule; weight decay is what brings it there."
    ),
    implements=("paperworks.testbeds.algorithmic.operation_table", "paperworks.testbeds.algorithmic.Table"),
)

PRIME = 59
LEARNED = 0.99  # training accuracy from which the equations count as memorised
GENERALISED = 0.95  # validation accuracy from which the rule counts as found
CHECK_EVERY = 50  # steps between two looks at the accuracies


class OperandNetwork(nn.Module):
    """answer = readout ReLU(W [left(a), right(b)] + c): an embedding for each operand, one hidden layer."""

    def __init__(self, tokens: int, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.left = nn.Embedding(tokens, width)
        self.right = nn.Embedding(tokens, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.readout = nn.Linear(hidden, tokens, bias=False)

    def forward(self, left: Int[Tensor, " rows"], right: Int[Tensor, " rows"]) -> Float[Tensor, "rows tokens"]:
        """Return the logits of the answer."""
        # An operand has few values, so its half of the hidden layer is computed once a value, not once a row.
        from_left, from_right = self.hidden.weight.split(self.left.embedding_dim, dim=1)
        seen = functional.embedding(left, functional.linear(self.left.weight, from_left, self.hidden.bias))
        seen = seen + functional.embedding(right, functional.linear(self.right.weight, from_right))
        return self.readout(seen.relu())


@dataclass
class Curve:
    """Accuracies along a run; a step is None when its accuracy was never reached."""

    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def note(self, step: int, training: float, validation: float) -> None:
        """Add one look at the accuracies."""
        self.steps.append(step)
        self.training.append(training)
        self.validation.append(validation)

    def step_learned(self) -> int | None:
        """Return the first step looked at with the training set memorised."""
        return self._first(self.training, LEARNED)

    def step_generalised(self) -> int | None:
        """Return the first step looked at with the rule found."""
        return self._first(self.validation, GENERALISED)

    def validation_when_learned(self) -> float | None:
        """Return the validation accuracy at the step the training set was memorised."""
        learned = self.step_learned()
        return None if learned is None else self.validation[self.steps.index(learned)]

    def _first(self, accuracies: list[float], wanted: float) -> int | None:
        return next((step for step, seen in zip(self.steps, accuracies, strict=True) if seen > wanted), None)


def _accuracy(model: nn.Module, table: Table) -> float:
    with torch.no_grad():
        return (model(table.left, table.right).argmax(dim=-1) == table.answer).float().mean().item()


def _loss(model: nn.Module, table: Table) -> Tensor:
    return functional.cross_entropy(model(table.left, table.right), table.answer)


def _run(
    lab: Lab, fraction: float, weight_decay: float, steps: int, *, stop_when_found: bool, description: str
) -> tuple[Curve, OperandNetwork]:
    """Train on a fraction of the addition table, full batch, and record both accuracies along the way."""
    shown, held_out = operation_table("x+y", PRIME).split(fraction, seed=lab.seed)
    torch.manual_seed(lab.seed)  # every run starts from the same weights
    model, curve = OperandNetwork(PRIME), Curve()
    settings = train.Settings(
        steps=steps,
        lr=1e-3,
        optimizer=train.AdamW(betas=(0.9, 0.98), weight_decay=weight_decay),
        warmup=10,
        schedule="constant",
        clip=None,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.progress(description, steps) as advance:

        def look(step: int) -> bool:
            if step % CHECK_EVERY and step > CHECK_EVERY:
                return False
            if step <= CHECK_EVERY and step % 5:  # closer looks at first, for a curve on a logarithmic axis
                return False
            curve.note(step, _accuracy(model, shown), _accuracy(model, held_out))
            advance(step - (curve.steps[-2] if len(curve.steps) > 1 else 0))
            return stop_when_found and curve.validation[-1] > GENERALISED

        train.fit(model, _loss, [shown], settings, on_step=look)
    return curve, model


def _shown_step(step: int | None) -> int | str:
    return "never" if step is None else step


@paper.claim(
    "A network generalises long after it has memorised, and weight decay makes it",
    paper="Figure 1: with half of x / y mod 97, training accuracy is near 100% before 10^3 steps, validation accuracy "
    "only near 10^6; section 3.3: weight decay is the most effective remedy",
    control="the same run, as many steps, without weight decay",
    tour=70,
)
def generalises_late(lab: Lab) -> Verdict:
    """Compare when the training set is memorised and when the rule is found, with and without weight decay."""
    limit = lab.pick(smoke=60, small=8000)
    run = partial(_run, lab, 0.5)
    with lab.threads(1):
        decayed, _ = run(1.0, limit, stop_when_found=True, description="with weight decay")
        free, _ = run(0.0, decayed.steps[-1], stop_when_found=False, description="without weight decay")
    _draw_curves(lab, decayed, free)
    learned, found = decayed.step_learned(), decayed.step_generalised()
    by_then = decayed.validation_when_learned()
    return lab.judge(
        checks={
            "validation passes 95% at 5 times the steps of memorising or later": (
                learned is not None and found is not None and found >= 5 * learned
            ),
            "within 8000 steps": found is not None and found < 8000,
            "validation is below 5% when the training set is memorised": by_then is not None and by_then < 0.05,
            "without weight decay validation stays below 50% for as many steps": max(free.validation) < 0.5,
        },
        measured={
            "training above 99% at step": _shown_step(learned),
            "validation above 95% at step": _shown_step(found),
            "validation accuracy when memorised": "never memorised" if by_then is None else by_then,
            "final validation accuracy": decayed.validation[-1],
        },
        control={
            "training above 99% at step": _shown_step(free.step_learned()),
            "best validation accuracy": max(free.validation),
            "steps": free.steps[-1],
        },
        note=f"x + y modulo {PRIME}, half of the {PRIME**2:,} equations, one hidden layer of 256, full batch, AdamW.",
    )


def _draw_curves(lab: Lab, decayed: Curve, free: Curve) -> None:
    with lab.figure("curves", figsize=(8.2, 3.7)) as figure:
        axes = figure.subplots()
        axes.plot(free.steps, free.validation, color=CONTROL, label="validation, no weight decay (control)")
        axes.plot(decayed.steps, decayed.training, color=COLORS[1], label="training")
        axes.plot(decayed.steps, decayed.validation, color=COLORS[0], linewidth=2.6, label="validation")
        learned, found = decayed.step_learned(), decayed.step_generalised()
        if learned is not None and found is not None:
            axes.annotate(
                "",
                (found, 0.5),
                (learned, 0.5),
                arrowprops={"arrowstyle": "<->", "color": INK, "linewidth": 1.1, "shrinkA": 2, "shrinkB": 2},
            )
            middle = (learned * found) ** 0.5  # the middle on a logarithmic axis
            axes.text(middle, 0.54, f"{found / learned:.0f} times the steps", ha="center")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("optimization steps")
        axes.set_title("Accuracy on the equations shown and on those held out")
        axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.72))


@paper.claim(
    "The less of the table is shown, the later the network generalises",
    paper="Section 3.1 and Figure 1: near 25 to 30% of the data, each 1% less raises the median steps to generalise by "
    "40 to 50%, while the steps to memorise hardly change",
    control="the steps to memorise the training set, which should not follow",
)
def less_data_takes_longer(lab: Lab) -> Verdict:
    """Time memorising and generalising at three training fractions."""
    fractions = (0.5, 0.6, 0.7)
    limit = lab.pick(smoke=40, small=8000)
    learned: list[int | None] = []
    found: list[int | None] = []
    with lab.threads(1):
        for fraction in fractions:
            name = f"{fraction:.0%} of the table"
            curve, _ = _run(lab, fraction, 1.0, limit, stop_when_found=True, description=name)
            learned.append(curve.step_learned())
            found.append(curve.step_generalised())
    # A run that never got there took at least the limit: enough for an order, not for a ratio.
    late = [limit if step is None else step for step in found]
    early = [limit if step is None else step for step in learned]
    names = [f"{fraction:.0%} shown" for fraction in fractions]
    return lab.judge(
        checks={
            "steps to generalise fall with every 10% more data": late[0] > late[1] > late[2],
            "from 50% to 70%, by a factor of at least 2": late[0] >= 2 * late[2],
            "steps to memorise change by a factor of less than 2": max(early) < 2 * min(early),
        },
        measured={
            f"validation above 95% at step, {name}": _shown_step(step) for name, step in zip(names, found, strict=True)
        },
        control={
            f"training above 99% at step, {name}": _shown_step(step) for name, step in zip(names, learned, strict=True)
        },
    )


@paper.claim(
    "The operation tables have the sizes of the paper",
    paper="Appendix A.1: all pairs of residues modulo 97 (division leaves out y = 0), all pairs of S5",
    kind="exact",
)
def table_sizes(lab: Lab) -> Verdict:
    """Count the equations of every operation, and the mirrored ones that leak between the splits."""
    tables = {operation: operation_table(operation) for operation in OPERATIONS}
    mirrored = {operation: table.mirrored_pairs() for operation, table in tables.items()}
    lab.table(
        "Equations, and facts that stand in the table twice as (a, b) and (b, a)",
        ["operation", "tokens", "equations", "mirrored pairs"],
        [[name, table.tokens, len(table), mirrored[name]] for name, table in tables.items()],
    )
    return lab.judge(
        checks={
            "9,409 equations for x + y": len(tables["x+y"]) == 9409,
            "9,312 for x / y": len(tables["x/y"]) == 9312,
            "14,400 for S5": len(tables["S5 xy"]) == 14_400,
            "every pair of a commutative operation is mirrored": mirrored["x+y"] == 97 * 96 // 2,
            "x - y and x / y mirror none but the pairs that give 1 or 0": (
                # (x - y) = (y - x) needs 2 (x - y) = 0; x / y = y / x needs x = -y, as x = y is no pair.
                mirrored["x-y"] == 0 and mirrored["x/y"] == 96 // 2
            ),
        },
        measured={
            "x+y": len(tables["x+y"]),
            "x/y": len(tables["x/y"]),
            "S5 xy": len(tables["S5 xy"]),
            "mirrored pairs of x+y": mirrored["x+y"],
        },
    )


@paper.claim(
    "Division modulo a prime is exact",
    paper="Appendix A.1.1: x / y (mod p) for 0 <= x < p, 0 < y < p",
    kind="exact",
)
def division_is_exact(lab: Lab) -> Verdict:
    """Check y * y^-1 = 1 and (x / y) * y = x for every equation, against Python's own modular power."""
    wrong_inverses, wrong_quotients = 0, 0
    for prime in (PRIME, 97):
        numbers = torch.arange(1, prime)
        expected = torch.tensor([pow(int(number), prime - 2, prime) for number in numbers])
        wrong_inverses += int((inverse(numbers, prime) != expected).sum())
        wrong_inverses += int((inverse(numbers, prime) * numbers % prime != 1).sum())
        table = operation_table("x/y", prime)
        wrong_quotients += int((table.answer * table.right % prime != table.left).sum())
    return lab.judge(
        checks={"every inverse is exact": wrong_inverses == 0, "every quotient is exact": wrong_quotients == 0},
        measured={"wrong inverses": wrong_inverses, "wrong quotients": wrong_quotients, "primes": [PRIME, 97]},
    )
