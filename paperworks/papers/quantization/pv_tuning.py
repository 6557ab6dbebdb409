"""PV-Tuning: train the codes of a compressed network as well, a few at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import compress
from paperworks.compress.formats.kmeans_vq import KMeansVQ
from paperworks.compress.formats.pv_tuning import PVTuning, largest_groups, tunable, v_step
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds import digits
from paperworks.testbeds.pictures import Images, accuracy, fit, network

paper = Paper(
    key="pv-tuning",
    title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
    authors="Malinovskii, Mazur, Ilin, Kuznedelev, Burlachenko, Yi, Alistarh, Richtarik",
    year=2024,
    ref="arXiv:2405.14852",
    family="quantization",
    summary=(
        "Compressed weights are codes and the values they stand for. Gradients move the values with ease, the codes "
        "only if each step is kept for few of them: then a network of one bit a weight gets much of its accuracy back."
    ),
    implements=(
        "paperworks.compress.formats.pv_tuning.PVTuning",
        "paperworks.compress.formats.pv_tuning.v_step",
        "paperworks.compress.formats.kmeans_vq.KMeansVQ",
    ),
    equation=r"P:\ \min_{y \in \mathcal{P}(x)} \phi(y), \qquad V:\ \min_{x \in \mathcal{V}(y)} "
    r"\lVert x - (y - \tfrac{1}{L} Z \nabla \phi(y)) \rVert^2, \quad Z \text{ keeps a few groups}",
    usage="""
import torch
from paperworks import compress

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
x = torch.randn(256, 64)
goal = model(x).detach()
compress.apply(model, compress.KMeansVQ(group=4, codes=16), "all-linear")  # one bit a weight
with compress.tunable(model):
    optimizer = compress.PVTuning(model, lr=3e-3, code_lr=0.03, share=0.01)
    for step in range(20):
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print("loss", float(loss.detach()), "codes changed in the last step:", optimizer.changed)
""",
    notes="A classifier of drawn digits at one bit a weight stands in for language models at two.",
)

FORMAT = KMeansVQ(group=4, codes=16)
VALUE_RATE = 3e-3  # of the codebooks
SHARE = 0.01  # of the groups a V step may change, the repository's
# Method -> settings; the rates are the best of three each, found on generated pictures of the same size.
PLANS: dict[str, dict[str, float]] = {
    "PV": {"lr": VALUE_RATE, "code_lr": 0.03, "share": SHARE},
    "STE": {"lr": VALUE_RATE, "code_lr": 0.01, "share": 1.0},
    "P": {"lr": 1e-2, "share": 0.0},
    "V steps over all groups": {"lr": VALUE_RATE, "code_lr": 0.03, "share": 1.0, "decay": 1.0},
}


def _digits(count: int, seed: int) -> Images:
    drawn = digits.draw(count, seed)
    return Images(drawn.pictures.flatten(1), drawn.labels)


@paper.claim(
    "At one bit a weight, training few codes at a time beats straight-through estimation and codebooks alone",
    paper="Llama-2-7B at 2 bits (the authors' repository): WikiText2 perplexity 5.68 with PV-Tuning, 5.92 with AQLM "
    "fine-tuned as a whole",
    control="codebooks only (P), straight-through estimation (STE), each with the same bits and steps; and V steps of "
    "the same length over all groups from where the weights are",
)
def few_codes_at_a_time(lab: Lab) -> Verdict:
    """Cluster a network's weights to one bit each and train 300 steps towards the dense network's outputs."""
    rows, taught, steps = lab.pick(smoke=(200, 4, 2), small=(4000, 600, 300))

    @cache
    def task(seed: int) -> tuple[nn.Module, Images, Images]:
        learned, held_out = _digits(rows, 10 * seed + 2), _digits(rows, 10 * seed + 3)
        dense = network(seed)
        fit(dense, learned, steps=taught, rate=3e-3, seed=seed, schedule="linear")
        return dense.eval(), learned, held_out

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        def tuned(seed: int) -> dict[str, float]:
            dense, learned, held_out = task(seed)
            changed = 0

            def divergence(model: nn.Module, batch: Images) -> Tensor:
                """KL(dense network || model) of the predicted classes."""
                with torch.no_grad():
                    wanted = dense(batch.pixels).log_softmax(-1)
                found = model(batch.pixels).log_softmax(-1)
                return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

            def count(step: int) -> None:
                nonlocal changed
                changed += made.changed

            model = compress.apply(copy.deepcopy(dense), FORMAT, "all-linear")
            if name in PLANS:
                with tunable(model):
                    made = PVTuning(model, **PLANS[name])
                    options = {"rate": VALUE_RATE, "schedule": "linear", "loss": divergence}
                    fit(model, learned, steps=steps, seed=seed, optimizer=made, on_step=count, **options)  # type: ignore[arg-type]
            with torch.no_grad():
                left = float(divergence(model, learned))
            return {"held-out accuracy": accuracy(model, held_out), "divergence": left, "codes changed": changed}

        return tuned

    with lab.threads(1):
        verdict = lab.compare(
            arms={name: arm(name) for name in (*PLANS, "not trained")},
            main=Beats("PV", "P", on="held-out accuracy", by=0.02),
            also=[
                Beats("PV", "STE", on="held-out accuracy"),
                Beats("PV", "STE", on="divergence", lower=True),
                Beats("P", "not trained", on="held-out accuracy"),
                AtMost("V steps over all groups", 0, on="codes changed"),
            ],
            seeds=3,
            note=f"A network 64 - 64 - 64 - 10 on drawn digits; groups of 4 weights, codebooks of 16 vectors, {steps} "
            "steps towards the dense network's outputs. STE and PV sum their steps up in latent weights; PV is STE "
            "with 1% of the codes changed at a time.",
        )
    lab.points("held-out accuracy", name="accuracy", title="Held-out accuracy at one bit a weight, equal steps")
    return verdict


@paper.claim(
    "Exact P and V steps never raise a quadratic loss, and a V step changes no more codes than it may",
    paper="the convergence statement: each P and V step minimises phi, or an upper bound of it that touches it",
    kind="exact",
)
def steps_never_raise_the_loss(lab: Lab) -> Verdict:
    """Alternate least squares for the codebook and V steps of rate 1/L on ||X (W - A)^T||^2, in growing subspaces."""
    draws = lab.generator(lab.seed)
    shape, size = (16, 32), FORMAT.group
    inputs = torch.randn(100, shape[1], generator=draws) * torch.logspace(0, -0.5, shape[1])
    moment = inputs.T @ inputs / 100
    goal = torch.randn(shape, generator=draws)
    rate = 1 / float(torch.linalg.eigvalsh(moment)[-1])
    stored = FORMAT.encode(torch.randn(shape, generator=draws))
    stored["codebook"] = stored["codebook"].float()

    def loss() -> float:
        error = (FORMAT.decode(stored, shape) - goal).double()
        return float(((error @ moment.double()) * error).sum())

    losses, most, allowed = [loss()], [], []
    for share in (0.02, 0.05, 0.1, 0.3, 1.0, 1.0) * lab.pick(smoke=1, small=5):
        stored["codebook"] = _best_codebook(FORMAT.unpack(stored["codes"], shape)[..., 0].long(), goal, moment)
        losses.append(loss())
        weight = FORMAT.decode(stored, shape)
        gradient = (weight - goal) @ moment
        before = FORMAT.unpack(stored["codes"], shape)
        stored = v_step(FORMAT, stored, shape, weight - rate * gradient, largest_groups(gradient, size, share))
        most.append(int((FORMAT.unpack(stored["codes"], shape) != before).sum()))
        allowed.append(math.ceil(share * before.numel()))
        losses.append(loss())
    rises = [after / before - 1 for before, after in pairwise(losses)]
    return lab.judge(
        checks={
            "no step raises the loss, to 1e-6": max(rises) < 1e-6,  # the codebook is float32
            "no step changes more codes than it may": all(a <= b for a, b in zip(most, allowed, strict=True)),
            "codes do change, and the loss falls": sum(most) > 0 and losses[-1] < losses[0],
        },
        measured={
            "steps": len(rises),
            "largest relative rise": max(rises),
            "changes of codes": sum(most),
            "loss, first and last": [losses[0], losses[-1]],
        },
    )


def _best_codebook(codes: Int[Tensor, "rows groups"], goal: Tensor, moment: Tensor) -> Float[Tensor, "entries group"]:
    """The codebook of least loss for these codes: linear in its numbers, solved in float64."""
    uses = functional.one_hot(codes, FORMAT.codes).double()
    count = FORMAT.codes * FORMAT.group
    spread = torch.einsum("rgc,de->rgdce", uses, torch.eye(FORMAT.group).double()).reshape(*goal.shape, count)
    moved = torch.einsum("rix,ij->rjx", spread, moment.double())
    curvature = torch.einsum("rjx,rjy->xy", moved, spread)
    slope = torch.einsum("rjx,rj->x", moved, goal.double())
    return (torch.linalg.pinv(curvature) @ slope).view(FORMAT.codes, FORMAT.group).float()
