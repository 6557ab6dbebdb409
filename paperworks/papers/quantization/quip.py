"""QuIP: turn the weights so that none stands out, then round each with the errors of those before it in mind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paperworks.compress.calibration.ldlq import feedback_factor, ldlq, proxy_loss
from paperworks.compress.formats.incoherence import incoherence, kronecker_rotation
from paperworks.compress.formats.quip import QuIP
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._calibrated_layers import ENERGY, energy_lost
from paperworks.papers.quantization._rounded_model import bench
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="quip",
    title="QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
    authors="Chee, Cai, Kuleshov, De Sa",
    year=2023,
    ref="arXiv:2307.13304",
    family="quantization",
    summary=(
        "Rounding loses least where no weight and no direction of the inputs stands out; random rotations bring that "
        "about, and with errors fed forward to later columns two bits a weight become usable."
    ),
    implements=(
        "paperworks.compress.formats.quip.QuIP",
        "paperworks.compress.calibration.ldlq.ldlq",
        "paperworks.compress.formats.incoherence.kronecker_rotation",
    ),
    equation=r"\tilde W = U W V^\top, \quad \tilde H = V H V^\top = (\dot U + I) D (\dot U + I)^\top, \quad "
    r"\hat W_k = Q\left( \tilde W_k + (\tilde W_{<k} - \hat W_{<k}) \dot U_k \right)",
    usage="""
import torch
from paperworks import compress

torch.manual_seed(0)
texts = [torch.randn(256, 64) @ torch.randn(64, 576) for _ in range(4)]  # inputs that correlate
for format in (compress.GPTQ(bits=2, group=None), compress.QuIP(bits=2)):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(576, 192))
    model[0].weight.data = torch.distributions.StudentT(3.0).sample((192, 576))  # heavy tails
    exact = model(texts[0])
    out = compress.apply(model, format, calibration=texts)(texts[0])
    print(type(format).__name__, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="The rotations are products of two small orthogonal matrices. Scored by the error of layers.",
)


@paper.claim(
    "At two bits incoherence processing loses less than half of what GPTQ loses",
    paper="Tables 1 and 2: at 2 bits OPTQ (GPTQ) breaks down where QuIP stays usable; at 4 bits they are close",
    control="QuIP without its rotations and rescaling; and GPTQ with a grid a row",
    reach="real",
)
def loses_less_than_gptq(lab: Lab) -> Verdict:
    """Round layers of SmolLM2 by each method and compare the output errors on text."""
    bed = bench(lab, blocks=(0, 14))
    ours, plain, gptq, nearest = "QuIP", "QuIP without processing", "GPTQ", "round to nearest"
    verdict = lab.compare(
        arms={
            ours: energy_lost(bed, QuIP(bits=2)),
            plain: energy_lost(bed, QuIP(bits=2, processing=False)),
            gptq: energy_lost(bed, lambda layer: layer.loss_by_row(2, feedback=True)),
            nearest: energy_lost(bed, lambda layer: layer.loss_by_row(2, feedback=False)),
        },
        main=Beats(ours, plain, on=ENERGY, by_ratio=0.5, lower=True),
        also=[
            Beats(ours, gptq, on=ENERGY, by_ratio=0.5, lower=True),
            Beats(gptq, nearest, on=ENERGY, lower=True),
        ],
        seeds=3,
        note=PROVENANCE + f"All linear layers of blocks 0 and 14, two bits; inputs from {bed.calibrated} windows of "
        f"{bed.length} tokens drawn by the seed, in the model as loaded.",
    )
    lab.points(ENERGY, log=True, title="Share of the outputs' energy lost at two bits, mean over layers")
    return verdict


@paper.claim(
    "Random rotations take the outliers out of heavy-tailed weights",
    paper="Section 4.1 and Lemma 5: after multiplication by random orthogonal matrices W is incoherent with high "
    "probability",
    control="the same weights as they are; and normal weights, which have no outliers to lose",
)
def rotations_remove_outliers(lab: Lab) -> Verdict:
    """Turn a matrix of Student's t with 3 degrees of freedom and one of normal numbers; compare largest magnitudes."""
    size = lab.pick(smoke=64, small=256)

    def arm(turn: Callable[[Tensor, int], Tensor]) -> Callable[[int], dict[str, float]]:
        def largest(seed: int) -> dict[str, float]:
            heavy = torch.distributions.StudentT(3.0).sample((size, size))
            normal = torch.randn(size, size, generator=lab.generator(seed))
            return {
                "incoherence, heavy tails": float(incoherence(turn(heavy, seed))),
                "incoherence, normal": float(incoherence(turn(normal, seed))),
            }

        return largest

    return lab.compare(
        arms={"turned": arm(_turned), "as they are": arm(lambda weight, _: weight)},
        main=Beats("turned", "as they are", on="incoherence, heavy tails", by_ratio=0.5, lower=True),
        also=[Within("turned", "as they are", on="incoherence, normal", by_ratio=0.25)],
        seeds=10,
        note="Incoherence is the largest magnitude, in root mean squares of the matrix.",
    )


def _turned(weight: Tensor, seed: int) -> Tensor:
    rows, columns = weight.shape
    turned = kronecker_rotation(columns, 2 * seed).apply(weight)
    return kronecker_rotation(rows, 2 * seed + 1).apply(turned.T).T


@paper.claim(
    "LDLQ is GPTQ, and its mean loss is the trace of D over 12",
    paper="Theorem 6: OPTQ is a special case of LDLQ; Theorem 1: worst and average losses tr(D) m/4 and tr(D) m/12",
    kind="exact",
)
def equals_gptq(lab: Lab) -> Verdict:
    """Round without clamping by both algorithms in float64; compare every code, and the mean losses with the traces."""
    columns, rows = 64, lab.pick(smoke=2000, small=20_000)
    draws = lab.generator(lab.seed)
    x = torch.randn(400, columns, generator=draws, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, columns, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=draws, dtype=torch.float64)
    moment = x.T @ x / len(x)
    weight = 100 * torch.rand(rows, columns, generator=draws, dtype=torch.float64)
    factor = feedback_factor(moment)
    ours = ldlq(weight, factor, _whole)[0]
    unit = factor + torch.eye(columns, dtype=torch.float64)
    pivots = torch.linalg.solve(unit, torch.linalg.solve(unit, moment).T).diagonal()
    with_feedback = float(proxy_loss(ours - weight, moment)) / rows / float(pivots.sum() / 12)
    plain = float(proxy_loss(weight.round() - weight, moment)) / rows / float(moment.trace() / 12)
    different = int((ours != _gptq(weight, moment)).sum())
    return lab.judge(
        checks={
            "not one code differs from GPTQ's": different == 0,
            "mean loss tr(D)/12 a row, within 2%": abs(with_feedback - 1) < 0.02,
            "tr(H)/12 without feedback, within 2%": abs(plain - 1) < 0.02,
            "tr(D) is at most tr(H)": bool(pivots.sum() <= moment.trace()),
        },
        measured={
            "codes compared": ours.numel(),
            "codes that differ": different,
            "mean loss over tr(D)/12": with_feedback,
            "mean loss of plain rounding over tr(H)/12": plain,
            "tr(D) over tr(H)": float(pivots.sum() / moment.trace()),
        },
    )


def _whole(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.round(), x.round()


def _gptq(weight: Tensor, moment: Tensor) -> Tensor:
    """Round as GPTQ does: by the upper Cholesky factor of the inverse, errors moved to the columns on the right."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    moved, out = weight.clone(), torch.empty_like(weight)
    for k in range(weight.shape[1]):
        out[:, k] = moved[:, k].round()
        moved[:, k + 1 :] -= torch.outer((moved[:, k] - out[:, k]) / factor[k, k], factor[k, k + 1 :])
    return out
