"""QuIP: turn the weights so that none stands out, then round each with the errors of those before it in mind."""

from __future__ import annotations

import torch
from torch import Tensor

from paperworks.compress.calibration.ldlq import feedback_factor, ldlq, proxy_loss
from paperworks.compress.formats.incoherence import incoherence, kronecker_rotation
from paperworks.compress.formats.quip import QuIP
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.papers.quantization._calibrated_layers import calibrated_layers, geometric_mean
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
)


@paper.claim(
    "At two bits incoherence processing loses less than half of what GPTQ loses",
    paper="Tables 1 and 2: at 2 bits OPTQ (GPTQ) breaks down where QuIP stays usable; at 4 bits they are close",
    control="GPTQ and plain rounding with a grid a row, and QuIP without its rotations and rescaling",
)
def loses_less_than_gptq(lab: Lab) -> Verdict:
    """Round layers of SmolLM2 by each method and compare the output errors on text."""
    layers, words = calibrated_layers(lab)
    found: dict[str, list[float]] = {}
    for layer in lab.track(layers, "layers"):
        for bits in (2, 4):
            for name, value in (
                ("plain rounding", layer.loss_by_row(bits, feedback=False)),
                ("GPTQ", layer.loss_by_row(bits, feedback=True)),
                ("QuIP without processing", layer.loss_in(QuIP(bits=bits, processing=False))),
                ("QuIP", layer.loss_in(QuIP(bits=bits))),
            ):
                found.setdefault(f"{name}, {bits} bits", []).append(value)
    mean = {name: geometric_mean(values) for name, values in found.items()}
    _draw_losses(lab, mean)
    lab.table(
        "Share of the output's energy lost, geometric mean over the layers",
        ["method", "2 bits", "4 bits"],
        [
            [name, mean[f"{name}, 2 bits"], mean[f"{name}, 4 bits"]]
            for name in ("plain rounding", "GPTQ", "QuIP without processing", "QuIP")
        ],
    )
    ratio = {bits: mean[f"GPTQ, {bits} bits"] / mean[f"QuIP, {bits} bits"] for bits in (2, 4)}
    return lab.judge(
        checks={
            "GPTQ loses at least twice as much at 2 bits": ratio[2] >= 2,
            "and less than plain rounding": mean["GPTQ, 2 bits"] < mean["plain rounding, 2 bits"],
            "without processing QuIP loses more": mean["QuIP without processing, 2 bits"] > mean["QuIP, 2 bits"],
            "at 4 bits the gain is smaller": ratio[4] < ratio[2],
        },
        measured={
            "loss, QuIP, 2 bits": mean["QuIP, 2 bits"],
            "GPTQ over QuIP, 2 bits": ratio[2],
            "GPTQ over QuIP, 4 bits": ratio[4],
            "layers": len(layers),
        },
        control={
            "loss, GPTQ, 2 bits": mean["GPTQ, 2 bits"],
            "loss, plain rounding, 2 bits": mean["plain rounding, 2 bits"],
            "loss, QuIP without processing, 2 bits": mean["QuIP without processing, 2 bits"],
        },
        note=PROVENANCE + f"All linear layers of blocks 0, 14 and 29; inputs from {words}, of the model as loaded.",
    )


def _draw_losses(lab: Lab, mean: dict[str, float]) -> None:
    with lab.figure("losses", figsize=(7.6, 2.8)) as figure:
        axes = figure.subplots()
        names = ["QuIP", "QuIP without processing", "GPTQ", "plain rounding"]
        values = [mean[f"{name}, 2 bits"] for name in names]
        colors = [COLORS[0] if name == "QuIP" else CONTROL for name in names]
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=5, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title("Output energy of SmolLM2's layers that rounding to 2 bits loses")


@paper.claim(
    "Random rotations take the outliers out of heavy-tailed weights",
    paper="Section 4.1 and Lemma 5: after multiplication by random orthogonal matrices W is incoherent with high "
    "probability",
    control="normal weights, which have no outliers to lose",
)
def rotations_remove_outliers(lab: Lab) -> Verdict:
    """Turn a matrix of Student's t with 3 degrees of freedom and one of normal numbers; compare largest magnitudes."""
    torch.manual_seed(lab.seed)
    size = lab.pick(smoke=64, small=256)
    falls = {
        name: incoherence(weight) / incoherence(_turned(weight))
        for name, weight in (
            ("heavy", torch.distributions.StudentT(3.0).sample((size, size))),
            ("normal", torch.randn(size, size)),
        )
    }
    return lab.judge(
        checks={
            "the largest weight falls by at least 2": falls["heavy"] >= 2,
            "that of normal weights stays within a quarter": abs(falls["normal"] - 1) < 0.25,
        },
        measured={"fall of the largest weight": falls["heavy"], "size": size},
        control={"fall of the largest normal weight": falls["normal"]},
    )


def _turned(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return kronecker_rotation(rows, 1).apply(kronecker_rotation(columns, 0).apply(weight).T).T


@paper.claim(
    "LDLQ is GPTQ, and its mean loss is the trace of D over 12",
    paper="Theorem 6: OPTQ is a special case of LDLQ; Theorem 1: worst and average losses tr(D) m/4 and tr(D) m/12",
    kind="exact",
)
def equals_gptq(lab: Lab) -> Verdict:
    """Round without clamping by both algorithms in float64; compare every code, and the mean losses with the traces."""
    columns, rows = 64, lab.pick(smoke=2000, small=20_000)
    draws = torch.Generator().manual_seed(lab.seed)
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
