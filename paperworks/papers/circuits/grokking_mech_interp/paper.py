"""What grows inside a network that groks modular addition: a few frequencies, long before anything shows on held-out
equations.

The small scale is the one-hidden-layer network of `grokking`, narrow enough that it makes do with few frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.interpret.taps import record
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.circuits.grokking_mech_interp import fourier
from paperworks.papers.training.grokking import OperandNetwork
from paperworks.testbeds.algorithmic import Table, operation_table

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
        """Return the accuracy on held-out pairs at each look; with frequencies, with only these kept or these gone."""
        change = fourier.restricted if keep else fourier.excluded
        tables = self.logits if frequencies is None else [change(each, frequencies) for each in self.logits]
        return [fourier.accuracy_and_loss(table, ~self.shown)[0] for table in tables]

    def shares(self, frequencies: Sequence[int]) -> list[float]:
        """Return the frequencies' share of the embeddings' power at each look."""
        index = torch.tensor(frequencies) - 1
        return [float(power[index].sum() / power.sum()) for power in self.power]

    def sparsity(self) -> list[float]:
        """Return Gini's coefficient of the embeddings' power at each look."""
        return [fourier.gini(power) for power in self.power]


def _pairs() -> tuple[Tensor, Tensor]:
    residues = torch.arange(PRIME)
    return residues.repeat_interleave(PRIME), residues.repeat(PRIME)


def _loss(model: nn.Module, table: Table) -> Tensor:
    return functional.cross_entropy(model(table.left, table.right), table.answer)


_RUNS: dict[tuple[int, int, float], Run] = {}  # two claims look at the same training


def _train(lab: Lab, weight_decay: float, steps: int | None = None) -> Run:
    """Train to held-out accuracy, or for so many steps, and look at all pairs along the way."""
    limit = steps or lab.pick(smoke=3 * LOOK_EVERY, small=10_000)
    known = (limit, lab.seed, weight_decay)
    if known in _RUNS:
        return _RUNS[known]
    table, _ = operation_table("x+y", PRIME).split(SHOWN, seed=lab.seed)
    shown = torch.zeros(PRIME, PRIME, dtype=torch.bool)
    shown[table.left, table.right] = True
    torch.manual_seed(lab.seed)  # every run starts from the same weights
    run = Run(OperandNetwork(PRIME, WIDTH, HIDDEN), shown)
    settings = train.Settings(
        steps=limit,
        lr=1e-3,
        optimizer=train.AdamW(betas=(0.9, 0.98), weight_decay=weight_decay),
        warmup=10,
        schedule="constant",
        clip=None,
        seed=None,
        save_every=None,
        log_every=limit,
        progress=False,
    )
    with lab.threads(1), lab.progress(f"adding modulo {PRIME}, weight decay {weight_decay:g}", limit) as advance:

        def look(step: int) -> bool:
            if step % LOOK_EVERY:
                return False
            run.note(step)
            advance(LOOK_EVERY)
            accuracy = fourier.accuracy_and_loss(run.logits[-1], ~shown)[0]
            return steps is None and accuracy > GENERALISED

        train.fit(run.model, _loss, [table], settings, on_step=look)
    _RUNS[known] = run
    return run


def _first(steps: list[int], values: list[float], at_least: float) -> int | None:
    return next((step for step, value in zip(steps, values, strict=True) if value >= at_least), None)


def _before(step: int | None, other: int | None) -> bool:
    return step is not None and other is not None and step < other


def _shown_step(step: int | None) -> int | str:
    return "never" if step is None else step


@paper.claim(
    "The circuit is there while held-out accuracy is still low",
    paper="Section 5, Figure 7: the restricted loss falls and the Fourier components turn sparse before test accuracy "
    "jumps; five key frequencies in the main run",
    control="the same start and steps without weight decay, which never generalises",
)
def circuit_leads(lab: Lab) -> Verdict:
    """Follow the end's key frequencies backwards: how much the embedding holds of them, and how far they suffice."""
    run = _train(lab, 1.0)
    free = _train(lab, 0.0, run.steps[-1])
    keys, free_keys = (fourier.key_frequencies(each.power[-1], KEYS) for each in (run, free))
    accuracy, alone = run.held_out(), run.held_out(keys)
    shares, sparsity = run.shares(keys), run.sparsity()
    free_shares, free_sparsity, free_alone = free.shares(free_keys), free.sparsity(), free.held_out(free_keys)
    early = min(1, len(run.steps) - 1)  # step 200
    circuit, jump = _first(run.steps, alone, 0.95), _first(run.steps, accuracy, 0.2)
    _draw_lead(lab, run, keys, accuracy, alone, free.held_out())
    at_jump = accuracy[run.steps.index(circuit)] if circuit is not None else "never"
    return lab.judge(
        checks={
            "the key frequencies alone are right on 95% of held-out pairs before the network is on 20%": (
                _before(circuit, jump)
            ),
            "the key frequencies' share of the power at least doubles from step 200 to the end": (
                shares[-1] >= 2 * shares[early]
            ),
            "Gini's coefficient at least doubles": sparsity[-1] >= 2 * sparsity[early],
            "without weight decay the share does not double": free_shares[-1] < 2 * free_shares[early],
            "nor do its key frequencies alone reach 95%": max(free_alone) < 0.95,
        },
        measured={
            "key frequencies": list(keys),
            "they alone reach 95% at step": _shown_step(circuit),
            "held-out accuracy then": at_jump,
            "held-out accuracy reaches 20% at step": _shown_step(jump),
            "the run ends at step": run.steps[-1],
            "with held-out accuracy": accuracy[-1],
            "share of the power, step 200": shares[early],
            "share of the power, end": shares[-1],
            "Gini, step 200": sparsity[early],
            "Gini, end": sparsity[-1],
        },
        control={
            "held-out accuracy": free.held_out()[-1],
            "share of the power, step 200": free_shares[early],
            "share of the power, end": free_shares[-1],
            "Gini, step 200": free_sparsity[early],
            "Gini, end": free_sparsity[-1],
            "best held-out accuracy of its key frequencies alone": max(free_alone),
        },
        note=(
            f"x + y modulo {PRIME}, {SHOWN:.0%} of the equations, {HIDDEN} hidden units. A wider network spreads its "
            "answer over more frequencies, of which five are then only a part."
        ),
    )


def _draw_lead(
    lab: Lab, run: Run, keys: Sequence[int], accuracy: list[float], alone: list[float], free: list[float]
) -> None:
    with lab.figure("lead", figsize=(8.6, 3.6)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        left.plot(run.steps, alone, color=COLORS[1], label="five key frequencies alone")
        left.plot(run.steps, accuracy, color=COLORS[0], label="the network")
        left.plot(run.steps, free, color=CONTROL, label="no weight decay (control)")
        left.set_xlabel("optimization steps")
        left.set_title("Accuracy on held-out equations")
        left.legend(loc="center right", bbox_to_anchor=(1.0, 0.24))
        power = run.power[-1] / run.power[-1].sum()
        frequencies = range(1, len(power) + 1)
        right.bar(frequencies, power.tolist(), color=[COLORS[1] if k in keys else CONTROL for k in frequencies])
        right.set_xlabel("frequency")
        right.set_yticks([0, 0.05, 0.1, 0.15])
        right.set_title("Embedding's power at the end")
        for axes in (left, right):
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


@paper.claim(
    "Without its key frequencies the grokked network loses the held-out equations",
    paper="Section 5: the excluded loss falls while the network memorises and rises as the circuit takes over, before "
    "the test loss falls; section 4.4: ablating any other frequencies improves the test loss",
    control="taking out as many of the weakest frequencies instead",
)
def answers_need_the_keys(lab: Lab) -> Verdict:
    """Take the key frequencies out of the logits, and the weakest ones for comparison; time the excluded loss."""
    run = _train(lab, 1.0)
    keys = fourier.key_frequencies(run.power[-1], KEYS)
    weakest = fourier.key_frequencies(-run.power[-1], KEYS)
    without, spared = run.held_out(keys, keep=False), run.held_out(weakest, keep=False)
    accuracy = run.held_out()
    losses = [fourier.accuracy_and_loss(fourier.excluded(table, keys), run.shown)[1] for table in run.logits]
    lowest = losses.index(min(losses))
    half = _first(run.steps, accuracy, 0.5)
    held_out = ~run.shown
    loss = fourier.accuracy_and_loss(run.logits[-1], held_out)[1]
    kept_loss = fourier.accuracy_and_loss(fourier.restricted(run.logits[-1], keys), held_out)[1]
    fit = fourier.fit_cosines(run.logits[-1], keys)
    frequencies, explained = _neurons(run.model)
    _draw_excluded(lab, run, accuracy, losses)
    return lab.judge(
        checks={
            "without the key frequencies held-out accuracy is at most 15%": without[-1] <= 0.15,
            "without the weakest ones it stays above 95%": spared[-1] > 0.95,
            "the training loss without the key frequencies is past its minimum before held-out accuracy reaches 50%": (
                _before(run.steps[lowest], half)
            ),
            "and ends at least 5% above it": losses[-1] > 1.05 * losses[lowest],
            "taking out all other frequencies lowers the held-out loss": kept_loss < loss,
            "half of the neurons are explained to 85% by one frequency": explained.median() > 0.85,
        },
        measured={
            "held-out accuracy": accuracy[-1],
            "without the key frequencies": without[-1],
            "training loss without them is lowest at step": run.steps[lowest],
            "that loss": losses[lowest],
            "at the end": losses[-1],
            "held-out accuracy reaches 50% at step": _shown_step(half),
            "held-out loss": loss,
            "held-out loss with the key frequencies only": kept_loss,
            "share of the logits' variance in cos w_k (a + b - c)": fit.explained,
            "median share of a neuron's variance in one frequency": explained.median(),
            "neurons whose frequency is a key one": torch.isin(frequencies, torch.tensor(keys)).float().mean(),
        },
        control={"held-out accuracy without the five weakest frequencies": spared[-1]},
        note=(
            "The run ends as soon as the held-out equations are right, before the clean-up is over: of the logits' "
            "variance the five cosines explain less than the paper's 95%."
        ),
    )


@torch.no_grad()
def _neurons(model: OperandNetwork) -> tuple[Tensor, Tensor]:
    left, right = _pairs()
    with record(model, ["hidden"]) as seen:
        model.hidden(torch.cat([model.left(left), model.right(right)], dim=-1))
    return fourier.neuron_frequencies(seen["hidden"].relu().view(PRIME, PRIME, -1))


def _draw_excluded(lab: Lab, run: Run, accuracy: list[float], losses: list[float]) -> None:
    with lab.figure("excluded", figsize=(7.4, 3.6)) as figure:
        axes = figure.subplots()
        axes.plot(run.steps, losses, color=COLORS[1], label="training loss without the key frequencies (nats)")
        axes.set_xlabel("optimization steps")
        axes.set_ylim(0, None)
        axes.set_title("What the network knows without its key frequencies")
        axes.plot(run.steps, accuracy, color=COLORS[0], label="held-out accuracy of the network (0 to 1)")
        axes.legend(loc="upper right")


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
