"""p-annealing: an L1 penalty that turns into a count while the autoencoder trains."""

from __future__ import annotations

from itertools import pairwise

import torch

from paperworks.interpret import sae
from paperworks.interpret.sae.kinds.annealing import AnnealedPenalty, power_sum
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.testbeds.planted_features import BATCH, COLUMNS, SETTING, Trained, trained

paper = Paper(
    key="p-annealing-sae",
    title="Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game Models",
    authors="Karvonen, Wright, Rager, Angell, Brinkmann, Smith, Verdun, Bau, Marks",
    year=2024,
    ref="arXiv:2408.00113",
    family="autoencoders",
    summary=(
        "Training starts with the convex L1 penalty and lowers p in sum f^p towards a count, rescaled so that the "
        "penalty never jumps: a plain ReLU autoencoder ends near gated ones, at a plain one's cost."
    ),
    implements=(
        "paperworks.interpret.sae.kinds.annealing.Annealing",
        "paperworks.interpret.sae.kinds.annealing.AnnealedPenalty",
    ),
)

PENALTIES = (2.0, 2.5, 3.0)
PLAIN = (3.0, 4.0, 5.0)
COMPARED_AT = 8.0  # L0


def _spec(penalty: float, *, annealed: bool) -> sae.Standard:
    return sae.Standard(latents=256, penalty=penalty, warmup=0.1, annealing=sae.Annealing() if annealed else None)


def _at(l0: float, runs: list[Trained], what: str) -> float:
    """Return a measure at an L0: linear between the two runs around it, that of the last run beyond the ends."""
    points = sorted((run.quality.l0, getattr(run.quality, what)) for run in runs)
    for (low, first), (high, second) in pairwise(points):
        if low <= l0 <= high:
            return float(first + (second - first) * (l0 - low) / (high - low))
    return float(points[0][1] if l0 < points[0][0] else points[-1][1])


@paper.claim(
    "Lowering p during training gives less error and less shrinkage than L1 with as many latents",
    paper="'p-Annealing' and Figure 3: standard autoencoders trained with p-annealing reach the trade of fidelity and "
    "sparsity of gated ones",
    control="p = 1 throughout, at the same L0 and for twice the steps as well",
)
def better_than_l1(lab: Lab) -> Verdict:
    """Train with and without annealing at several penalties; compare error and shrinkage at equal L0."""
    path: list[tuple[int, float, float]] = []
    every = lab.pick(smoke=2, small=25)
    probe: list[torch.Tensor] = []

    def watch(step: int, model: sae.SparseAutoencoder) -> None:
        annealed = getattr(model, "annealed", None)
        assert isinstance(annealed, AnnealedPenalty)
        if step % every == 0:
            if not probe:
                probe.append(sae.Planted(mean_square=64.0, seed=lab.seed).draw(2048, torch.Generator().manual_seed(8)))
            with torch.no_grad():
                on = float((model.encode(probe[0]) > 0).sum(dim=1).double().mean())
            path.append((step, annealed.power, on))

    annealed = [
        trained(
            lab,
            _spec(penalty, annealed=True).build,
            f"p falls, penalty {penalty:g}",
            watch=watch if penalty == 3.0 else None,
        )
        for penalty in PENALTIES
    ]
    plain = [trained(lab, _spec(penalty, annealed=False).build, f"p = 1, penalty {penalty:g}") for penalty in PLAIN]
    longer = [
        trained(lab, _spec(penalty, annealed=False).build, f"p = 1, penalty {penalty:g}, twice as long", steps=4000)
        for penalty in (3.0, 4.0)
    ]
    ours = min(annealed, key=lambda run: abs(run.quality.l0 - COMPARED_AT))
    l0 = ours.quality.l0
    control_fvu, control_bias = _at(l0, plain, "fvu"), _at(l0, plain, "bias")
    longer_fvu = _at(l0, longer, "fvu")
    _draw(lab, annealed, plain, path)
    lab.table(
        "What was trained",
        ["autoencoder", *COLUMNS],
        [
            *([f"p from 1 to 0.2, penalty {p:g}", *run.row] for p, run in zip(PENALTIES, annealed, strict=True)),
            *([f"p = 1, penalty {p:g}", *run.row] for p, run in zip(PLAIN, plain, strict=True)),
            *([f"p = 1, penalty {p:g}, 4,000 steps", *run.row] for p, run in zip((3, 4), longer, strict=True)),
        ],
    )
    return lab.judge(
        checks={
            "FVU at least 10% below p = 1 at the same L0": ours.quality.fvu < 0.9 * control_fvu,
            "an L0 within 1 of 8": abs(l0 - COMPARED_AT) < 1,
            "and below p = 1 trained twice as long": ours.quality.fvu < longer_fvu,
            "gamma above 0.8": ours.quality.bias > 0.8,
            "p = 1: gamma below 0.6 at the same L0": control_bias < 0.6,
        },
        measured={
            "L0": l0,
            "FVU": ours.quality.fvu,
            "gamma": ours.quality.bias,
            "dead": ours.quality.dead,
            "mean best cosine": ours.recovery.mmcs,
            "L0 at penalties 2, 2.5, 3": [run.quality.l0 for run in annealed],
            "FVU at penalties 2, 2.5, 3": [run.quality.fvu for run in annealed],
            "gamma at penalties 2, 2.5, 3": [run.quality.bias for run in annealed],
        },
        control={
            "FVU at this L0": control_fvu,
            "gamma at this L0": control_bias,
            "FVU at this L0 after 4,000 steps": longer_fvu,
            "L0 at penalties 3, 4, 5": [run.quality.l0 for run in plain],
            "FVU at penalties 3, 4, 5": [run.quality.fvu for run in plain],
            "gamma at penalties 3, 4, 5": [run.quality.bias for run in plain],
        },
        note=SETTING
        + " Mean ||x||^2 of 64; 2,000 steps, p falls from 1 to 0.2 in 10 updates over the second half. The "
        "control's numbers at an L0 are interpolated between penalties.",
    )


def _draw(lab: Lab, annealed: list[Trained], plain: list[Trained], path: list[tuple[int, float, float]]) -> None:
    with lab.figure("annealing", figsize=(8.6, 3.4)) as figure:
        error, course = figure.subplots(1, 2)
        for runs, color, label in ((plain, CONTROL, "p = 1"), (annealed, COLORS[0], "p from 1 to 0.2")):
            points = sorted((run.quality.l0, run.quality.fvu) for run in runs)
            error.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
        error.set_title("Variance unexplained")
        error.set_xlabel("latents on (L0)")
        error.set_ylim(bottom=0)
        error.legend()
        steps, powers, on = zip(*path, strict=True)
        course.plot(steps, on, color=COLORS[0], label="latents on (L0)")
        course.set_yscale("log")
        course.set_title("L0 while p falls (penalty 3)")
        course.set_xlabel("step")
        course.legend(loc="upper right")
        second = course.twinx()
        second.plot(steps, powers, color=COLORS[1], linewidth=1.4, label="p (right)")
        second.set_ylim(0, 1.05)
        second.grid(False)
        second.tick_params(colors=FAINT)
        second.legend(loc="lower left")


@paper.claim(
    "It starts as L1, ends at p_end, and no change of p changes the penalty",
    paper="'p-Annealing': p = 1 until annealing starts, then linear to p_end; lambda is rescaled by the ratio of the "
    "penalties before and after, over a queue of recent batches",
    kind="exact",
)
def the_penalty_never_jumps(lab: Lab) -> Verdict:
    """Go through a whole annealing in float64 and compare the penalty of the queue around each update."""
    torch.manual_seed(lab.seed)
    data = sae.Planted(mean_square=64.0)
    model, plain = (_spec(3.0, annealed=which).build(64).double() for which in (True, False))
    plain.load_state_dict(model.state_dict(), strict=False)
    annealed = getattr(model, "annealed", None)
    assert isinstance(annealed, AnnealedPenalty)
    batches = [data.draw(BATCH, torch.Generator().manual_seed(seed)).double() for seed in range(10)]
    same = float((model.loss(batches[0], 0.3)[0] - plain.loss(batches[0], 0.3)[0]).detach().abs())

    def penalty() -> float:
        with torch.no_grad():
            total = sum(power_sum(model.encode(x), annealed.power).item() for x in batches)
        return total * annealed.rescaling.item()

    changes, powers = [], [annealed.power]
    for update in range(10):
        before = penalty()
        for x in batches:
            model.loss(x, 0.5 + 0.05 * update)
            model.after_step()
        powers.append(annealed.power)
        changes.append(abs(penalty() / before - 1))
    f = torch.tensor([0.0, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(power_sum(f[None], 0.2), f)
    return lab.judge(
        checks={
            "every update leaves the queue's penalty as it was, to 1e-12": max(changes) < 1e-12,
            "before annealing it is L1, bit for bit": same == 0.0,
            "p goes from 1 to 0.2 in ten equal steps": max(
                abs(power - (1 - 0.08 * step)) for step, power in enumerate(powers)
            )
            < 1e-12,
            "a latent that is off gets no gradient": float(gradient[0]) == 0.0,
        },
        measured={
            "largest relative change of the penalty": max(changes),
            "difference from L1 before annealing": same,
            "p": [round(power, 10) for power in powers],
            "gradients at 0, 0.001 and 2": gradient.tolist(),
        },
    )
