"""Grokking: a network that has long memorised its training set suddenly generalises.

The small scale is a one-hidden-layer network on addition modulo 43, full batch: the same effect as the paper's
transformer on modulo 97, within seconds of one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
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
    usage="""
from paperworks.testbeds.algorithmic import operation_table

table = operation_table("x/y", 97)                       # every equation x / y = z modulo 97, as token ids
shown, held_out = table.split(0.5, seed=0)               # train on half of them
print(len(shown), "equations to learn from,", len(held_out), "to predict")
print("first:", shown.left[0].item(), "/", shown.right[0].item(), "=", shown.answer[0].item())
""",
    notes="The paper's network is a two-layer transformer and its table modulo 97; here a network with one hidden "
    "layer learns addition modulo 43, so that all seeds take two minutes.",
)

PRIME = 43
LEARNED = 0.99  # training accuracy from which the equations count as memorised
GENERALISED = 0.95  # validation accuracy from which the rule counts as found
CHECK_EVERY = 25  # steps between two looks at the accuracies


class OperandNetwork(nn.Module):
    """answer = readout ReLU(W [left(a), right(b)] + c): an embedding for each operand, one hidden layer."""

    def __init__(self, tokens: int, width: int = 64, hidden: int = 128) -> None:
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
    """Accuracies along a run of at most `limit` steps; what was never reached counts as reached at the limit."""

    limit: int
    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def note(self, step: int, training: float, validation: float) -> None:
        """Add one look at the accuracies."""
        self.steps.append(step)
        self.training.append(training)
        self.validation.append(validation)

    def step_learned(self) -> int:
        """First step looked at with the training set memorised."""
        return self._first(self.training, LEARNED)

    def step_generalised(self) -> int:
        """First step looked at with the rule found."""
        return self._first(self.validation, GENERALISED)

    def validation_when_learned(self) -> float:
        """Validation accuracy at the step the training set was memorised, or at the end."""
        learned = self.step_learned()
        return self.validation[self.steps.index(learned)] if learned in self.steps else self.validation[-1]

    def _first(self, accuracies: list[float], wanted: float) -> int:
        return next((step for step, seen in zip(self.steps, accuracies, strict=True) if seen > wanted), self.limit)


def _accuracy(model: nn.Module, table: Table) -> float:
    with torch.no_grad():
        return (model(table.left, table.right).argmax(dim=-1) == table.answer).float().mean().item()


def _loss(model: nn.Module, table: Table) -> Tensor:
    return functional.cross_entropy(model(table.left, table.right), table.answer)


def _run(lab: Lab, seed: int, fraction: float, weight_decay: float, steps: int, *, stop_when_found: bool) -> Curve:
    """Train on a fraction of the addition table, full batch, and record both accuracies along the way."""
    shown, held_out = operation_table("x+y", PRIME).split(fraction, seed=seed)
    model, curve = OperandNetwork(PRIME), Curve(limit=steps)
    settings = train.Settings(
        steps=steps,
        lr=3e-3,
        optimizer=train.AdamW(betas=(0.9, 0.98), weight_decay=weight_decay),
        warmup=10,
        schedule="constant",
        clip=None,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress("steps", steps) as advance:

        def look(step: int) -> bool:
            advance(1)
            # Closer looks at first, for a curve on a logarithmic axis.
            if step % (5 if step <= CHECK_EVERY else CHECK_EVERY):
                return False
            curve.note(step, _accuracy(model, shown), _accuracy(model, held_out))
            return stop_when_found and curve.validation[-1] > GENERALISED

        train.fit(model, _loss, [shown], settings, on_step=look)
    return curve


@paper.claim(
    "A network generalises long after it has memorised, and weight decay makes it",
    paper="Figure 1: with half of x / y mod 97, training accuracy is near 100% before 10^3 steps, validation accuracy "
    "only near 10^6; section 3.3: weight decay is the most effective remedy",
    control="the same run, as many steps, without weight decay",
    tour=70,
)
def generalises_late(lab: Lab) -> Verdict:
    """Compare when the training set is memorised and when the rule is found, with and without weight decay."""
    steps = lab.pick(smoke=60, small=3000)

    def arm(weight_decay: float) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            curve = _run(lab, seed, 0.6, weight_decay, steps, stop_when_found=False)
            return {
                "validation accuracy at the end": curve.validation[-1],
                "validation accuracy when memorised": curve.validation_when_learned(),
                "steps to memorise": curve.step_learned(),
                "steps to generalise, in steps to memorise": curve.step_generalised() / curve.step_learned(),
                "step": [float(step) for step in curve.steps],
                "training": curve.training,
                "validation": curve.validation,
            }

        return measured

    decay, free = "weight decay 1", "no weight decay"
    verdict = lab.compare(
        arms={decay: arm(1.0), free: arm(0.0)},
        main=Beats(decay, free, on="validation accuracy at the end", by=0.4),
        also=[
            AtLeast(decay, 5, on="steps to generalise, in steps to memorise"),
            AtMost(decay, 0.05, on="validation accuracy when memorised"),
            AtLeast(decay, GENERALISED, on="validation accuracy at the end"),
        ],
        seeds=3,
        note=f"x + y modulo {PRIME}, 60% of the {PRIME**2:,} equations, one hidden layer of 128, full batch, AdamW, "
        f"{steps:,} steps.",
    )
    lab.curves("validation", "training", x="step", log="x", title="Accuracy", figsize=(8.2, 3.7))
    return verdict


@paper.claim(
    "The less of the table is shown, the later the network generalises",
    paper="Section 3.1 and Figure 1: near 25 to 30% of the data, each 1% less raises the median steps to generalise by "
    "40 to 50%, while the steps to memorise hardly change",
    control="the same run with 50% of the table, and the steps to memorise, which should not follow",
)
def less_data_takes_longer(lab: Lab) -> Verdict:
    """Time memorising and generalising at three training fractions."""
    limit = lab.pick(smoke=40, small=6000)

    def arm(fraction: float) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            curve = _run(lab, seed, fraction, 1.0, limit, stop_when_found=True)
            return {"steps to generalise": curve.step_generalised(), "steps to memorise": curve.step_learned()}

        return measured

    half, more, most = "50% shown", "60% shown", "70% shown"
    verdict = lab.compare(
        arms={most: arm(0.7), more: arm(0.6), half: arm(0.5)},
        main=Beats(most, half, on="steps to generalise", by_ratio=0.5, lower=True),
        also=[
            Beats(most, more, on="steps to generalise", lower=True),
            Beats(more, half, on="steps to generalise", lower=True),
            Within(most, half, on="steps to memorise", by_ratio=0.5),
        ],
        seeds=3,
        note=f"A run that has not found the rule after {limit:,} steps counts as {limit:,}.",
    )
    lab.points("steps to generalise", log=True)
    return verdict


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
