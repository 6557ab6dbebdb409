"""What grows inside a network that groks modular addition: a few frequencies, long before anything shows on held-out
equations.

The small scale is the one-hidden-layer network of `grokking`, narrow enough that it makes do with few frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.interpret.taps import record
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.papers.circuits.grokking_mech_interp import fourier
from paperworks.papers.training.grokking import OperandNetwork
from paperworks.testbeds.algorithmic import Table, operation_table
from paperworks.testbeds.training import fit

paper = Paper(
    key="grokking-mech-interp",
    title="Progress measures for grokking via mechanistic interpretability",
    authors="Nanda, Chan, Lieberum, Smith, Steinhardt",
    year=2023,
    ref="arXiv:2301.05217",
    family="circuits",
    summary=(
        "A network that groks addition modulo p adds angles: a few Fourier frequencies carry its answer. They grow "
        "steadily while held-out accuracy is still low, and the jump comes when weight decay has cleaned up."
    ),
    implements=(
        "paperworks.papers.circuits.grokking_mech_interp.fourier.fourier_basis",
        "paperworks.papers.circuits.grokking_mech_interp.fourier.key_frequencies",
        "paperworks.papers.circuits.grokking_mech_interp.fourier.restricted",
        "paperworks.papers.circuits.grokking_mech_interp.fourier.excluded",
        "paperworks.papers.circuits.grokking_mech_interp.fourier.fit_cosines",
        "paperworks.papers.circuits.grokking_mech_interp.fourier.neuron_frequencies",
    ),
    equation=r"\text{logit}(c) \approx \sum_k \alpha_k \cos\!\left(\tfrac{2 \pi k}{p} (a + b - c)\right)",
    usage="""
from paperworks.papers.circuits.grokking_mech_interp import fourier

logits = fourier.cosine_logits(113, [14, 35, 41, 42, 52])    # the algorithm written down, for all a, b and c
print("accuracy:", fourier.accuracy_and_loss(logits)[0])
print("explained:", fourier.fit_cosines(logits, [14, 35, 41, 42, 52]).explained)
without = fourier.excluded(logits, [14, 35, 41])
print("with two of the five frequencies:", fourier.accuracy_and_loss(without)[0])
""",
    notes="The paper's network is a one-layer transformer modulo 113, trained past the clean-up; here one hidden layer "
    "adds modulo 59 and stops as soon as the held-out equations are right.",
)

PRIME = 59  # the modulus
KEYS = 5  # as many as the paper's main run has
WIDTH, HIDDEN = 32, 64
SHOWN = 0.6  # share of the equations
GENERALISED = 0.997  # held-out accuracy at which the run ends
LOOK_EVERY = 100


@dataclass
class Run:
    """A network's logits and embeddings along its training; `shown` marks the pairs it is trained on."""

    model: OperandNetwork
    shown: Bool[Tensor, "p p"]
    steps: list[int] = field(default_factory=list)
    logits: list[Float[Tensor, "p p p"]] = field(default_factory=list)
    power: list[Float[Tensor, " frequencies"]] = field(default_factory=list)

    @torch.no_grad()
    def note(self, step: int) -> None:
        """Add one look at all pairs."""
        both = torch.cat([self.model.left.weight, self.model.right.weight], dim=1)
        self.steps.append(step)
        self.logits.append(self.model(*_pairs()).view(PRIME, PRIME, PRIME))
        self.power.append(fourier.frequency_power(both))

    def held_out(self, frequencies: Sequence[int] | None = None, *, keep: bool = True) -> list[float]:
        """Accuracy on held-out pairs at each look; with frequencies, with only these kept or these gone."""
        change = fourier.restricted if keep else fourier.excluded
        tables = self.logits if frequencies is None else [change(each, frequencies) for each in self.logits]
        return [fourier.accuracy_and_loss(table, ~self.shown)[0] for table in tables]

    def shares(self, frequencies: Sequence[int]) -> list[float]:
        """The frequencies' share of the embeddings' power at each look."""
        index = torch.tensor(frequencies) - 1
        return [float(power[index].sum() / power.sum()) for power in self.power]

    def sparsity(self) -> list[float]:
        """Gini's coefficient of the embeddings' power at each look."""
        return [fourier.gini(power) for power in self.power]


def _pairs() -> tuple[Tensor, Tensor]:
    residues = torch.arange(PRIME)
    return residues.repeat_interleave(PRIME), residues.repeat(PRIME)


def _loss(model: nn.Module, table: Table) -> Tensor:
    return functional.cross_entropy(model(table.left, table.right), table.answer)


_RUNS: dict[tuple[int, int, float], Run] = {}  # two claims look at the same training


def _train(lab: Lab, seed: int, weight_decay: float, steps: int | None = None) -> Run:
    """Train to held-out accuracy, or for `steps`, and look at all pairs along the way."""
    limit = steps or lab.pick(smoke=3 * LOOK_EVERY, small=10_000)
    known = (limit, seed, weight_decay)
    if known in _RUNS:
        return _RUNS[known]
    table, _ = operation_table("x+y", PRIME).split(SHOWN, seed=seed)
    shown = torch.zeros(PRIME, PRIME, dtype=torch.bool)
    shown[table.left, table.right] = True
    torch.manual_seed(seed)  # every run of a seed starts from the same weights
    run = Run(OperandNetwork(PRIME, WIDTH, HIDDEN), shown)

    def look(step: int) -> bool:
        if step % LOOK_EVERY:
            return False
        run.note(step)
        return steps is None and fourier.accuracy_and_loss(run.logits[-1], ~shown)[0] > GENERALISED

    adam = train.AdamW(betas=(0.9, 0.98), weight_decay=weight_decay)
    constant: dict[str, Any] = {"schedule": "constant", "warmup": 10, "clip": None}
    with lab.threads(1):
        fit(run.model, _loss, [table], steps=limit, lr=1e-3, seed=seed, optimizer=adam, on_step=look, **constant)
    _RUNS[known] = run
    return run


def _first(steps: list[int], values: list[float], at_least: float) -> int:
    """First step at which a curve reaches a value; one look past the end where it never does."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= at_least), steps[-1] + LOOK_EVERY)


@paper.claim(
    "The circuit is there while held-out accuracy is still low",
    paper="Section 5, Figure 7: the restricted loss falls and the Fourier components turn sparse before test accuracy "
    "jumps; five key frequencies in the main run",
    control="the same start and steps without weight decay, which never generalises",
)
def circuit_leads(lab: Lab) -> Verdict:
    """Follow the end's key frequencies backwards: how much the embedding holds of them, and how far they suffice."""

    def arm(weight_decay: float) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            run = _train(lab, seed, 1.0)
            if not weight_decay:
                run = _train(lab, seed, 0.0, run.steps[-1])
            keys = fourier.key_frequencies(run.power[-1], KEYS)
            accuracy, alone, shares, sparsity = run.held_out(), run.held_out(keys), run.shares(keys), run.sparsity()
            early = min(1, len(run.steps) - 1)  # step 200
            circuit, jump = _first(run.steps, alone, 0.95), _first(run.steps, accuracy, 0.2)
            return {
                "best accuracy of the key frequencies alone": max(alone),
                "steps by which the key frequencies lead": jump - circuit,
                "key frequencies' share of the power, end over step 200": shares[-1] / shares[early],
                "Gini's coefficient, end over step 200": sparsity[-1] / sparsity[early],
                "step": [float(step) for step in run.steps],
                "the network": accuracy,
                "five key frequencies alone": alone,
            }

        return measured

    decay, free = "weight decay 1", "no weight decay"
    share, gini = "key frequencies' share of the power, end over step 200", "Gini's coefficient, end over step 200"
    verdict = lab.compare(
        arms={decay: arm(1.0), free: arm(0.0)},
        main=Beats(decay, free, on="best accuracy of the key frequencies alone", by=0.3),
        also=[
            # 95% right by the key frequencies alone, before the network is right on 20%.
            AtLeast(decay, LOOK_EVERY, on="steps by which the key frequencies lead"),
            AtLeast(decay, 2.0, on=share),
            AtLeast(decay, 2.0, on=gini),
            AtMost(free, 2.0, on=share),
        ],
        seeds=3,
        note=f"x + y modulo {PRIME}, {SHOWN:.0%} of the equations, {HIDDEN} hidden units; accuracies on held-out "
        "equations. A wider network spreads its answer over more frequencies, of which five are then only a part.",
    )
    lab.curves(
        "five key frequencies alone", "the network", x="step", name="lead", title="Accuracy on held-out equations"
    )
    return verdict


@paper.claim(
    "Without its key frequencies the grokked network loses the held-out equations",
    paper="Section 5: the excluded loss falls while the network memorises and rises as the circuit takes over, before "
    "the test loss falls; section 4.4: ablating any other frequencies improves the test loss",
    control="taking out as many of the weakest frequencies instead",
)
def answers_need_the_keys(lab: Lab) -> Verdict:
    """Take the key frequencies out of the logits, and the weakest ones for comparison; time the excluded loss."""

    def arm(weakest: bool) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            run = _train(lab, seed, 1.0)
            power = run.power[-1]
            keys, gone = (
                fourier.key_frequencies(power, KEYS),
                fourier.key_frequencies(-power if weakest else power, KEYS),
            )
            losses = [fourier.accuracy_and_loss(fourier.excluded(table, gone), run.shown)[1] for table in run.logits]
            lowest, held_out = losses.index(min(losses)), ~run.shown
            loss = fourier.accuracy_and_loss(run.logits[-1], held_out)[1]
            kept = fourier.accuracy_and_loss(fourier.restricted(run.logits[-1], keys), held_out)[1]
            return {
                "held-out accuracy without them": run.held_out(gone, keep=False)[-1],
                "steps from the training loss's minimum without them to 50% held-out accuracy": (
                    _first(run.steps, run.held_out(), 0.5) - run.steps[lowest]
                ),
                "training loss without them, end over minimum": losses[-1] / losses[lowest],
                "held-out loss with the key frequencies only, over that of the network": kept / loss,
                "median share of a neuron's variance in one frequency": float(_neurons(run.model)[1].median()),
                "share of the logits' variance in five cosines": fourier.fit_cosines(run.logits[-1], keys).explained,
                "step": [float(step) for step in run.steps],
                "training loss without them": losses,
            }

        return measured

    keys, weakest = "key frequencies taken out", "weakest frequencies taken out"
    verdict = lab.compare(
        arms={keys: arm(False), weakest: arm(True)},
        main=Beats(keys, weakest, on="held-out accuracy without them", by=0.8, lower=True),
        also=[
            AtMost(keys, 0.15, on="held-out accuracy without them"),
            AtLeast(
                keys,
                LOOK_EVERY,
                on="steps from the training loss's minimum without them to 50% held-out accuracy",
            ),
            AtLeast(keys, 1.05, on="training loss without them, end over minimum"),
            AtMost(keys, 1.0, on="held-out loss with the key frequencies only, over that of the network"),
            AtLeast(keys, 0.85, on="median share of a neuron's variance in one frequency"),
        ],
        seeds=3,
        note="The run ends as soon as the held-out equations are right, before the clean-up is over: of the logits' "
        "variance the five cosines explain less than the paper's 95%.",
    )
    lab.curves("training loss without them", x="step", name="excluded", title="Training loss, frequencies taken out")
    return verdict


@torch.no_grad()
def _neurons(model: OperandNetwork) -> tuple[Tensor, Tensor]:
    left, right = _pairs()
    with record(model, ["hidden"]) as seen:
        model.hidden(torch.cat([model.left(left), model.right(right)], dim=-1))
    return fourier.neuron_frequencies(seen["hidden"].relu().view(PRIME, PRIME, -1))


@paper.claim(
    "Cosines of a few frequencies add modulo p, every pair right",
    paper="Section 4: logits sum_k cos(w_k (a + b - c)) are largest at c = a + b mod p; p = 113",
    kind="exact",
)
def algorithm_is_exact(lab: Lab) -> Verdict:
    """Check the basis, and the written-down logits for each single frequency of a small p and for five of p = 113."""
    modulus = 113
    basis = fourier.fourier_basis(modulus)
    off = (basis @ basis.mT - torch.eye(modulus, dtype=torch.float64)).abs().max().item()
    single = [fourier.accuracy_and_loss(fourier.cosine_logits(PRIME, [k]))[0] for k in range(1, PRIME // 2 + 1)]
    draws = torch.Generator().manual_seed(lab.seed)
    five = (torch.randperm(modulus // 2, generator=draws)[:KEYS] + 1).tolist()
    ideal = fourier.cosine_logits(modulus, five)
    accuracy = fourier.accuracy_and_loss(ideal)[0]
    top = ideal.topk(2).values
    gap = (top[..., 0] - top[..., 1]).min().item()
    kept = (fourier.restricted(ideal, five) - ideal).abs().max().item()
    left = fourier.excluded(ideal, five).abs().max().item()
    return lab.judge(
        checks={
            "the basis is orthonormal, to 1e-12": off < 1e-12,
            "five frequencies are right on all 12,769 pairs": accuracy == 1.0,
            "so is any one frequency modulo 59": min(single) == 1.0,
            "keeping the five keeps the logits, to 1e-10": kept < 1e-10,
            "and excluding them leaves nothing, to 1e-10": left < 1e-10,
        },
        measured={
            "error of F F^T = I": off,
            "accuracy of five frequencies": accuracy,
            "frequencies": sorted(five),
            "least lead of the right answer": gap,
            "least accuracy of one frequency modulo 59": min(single),
            "change by restricting": kept,
            "left after excluding": left,
        },
    )
