"""Gated autoencoders: what is on and how much are two questions, and only the first is penalized."""

from __future__ import annotations

import torch

from paperworks.interpret import sae
from paperworks.interpret.sae.kinds.gated import GatedAutoencoder
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.testbeds.planted_features import COLUMNS, SETTING, Trained, trained

paper = Paper(
    key="gated-sae",
    title="Improving Dictionary Learning with Gated Sparse Autoencoders",
    authors="Rajamanoharan, Conmy, Smith, Lieberum, Varma, Kram\u00e1r, Shah, Nanda",
    year=2024,
    ref="arXiv:2404.16014; compared again in arXiv:2407.14435",
    family="autoencoders",
    summary=(
        "An L1 penalty makes every activation too small. Letting a gate decide which latents are on, and penalizing "
        "only the gate, removes the shrinkage: the same fidelity with about half as many latents."
    ),
    implements=("paperworks.interpret.sae.kinds.gated.Gated",),
)

GATED = (4.0, 5.0, 6.0)
L1 = (3.0, 4.0, 5.0)
STEPS = 4000  # L1 needs them: after 2,000 it is either at twice the L0 or collapsed
MIDDLE = 5.0  # the L0 at which both are compared: as many directions as are on


def _nearest(runs: list[Trained]) -> Trained:
    return min(runs, key=lambda run: abs(run.quality.l0 - MIDDLE))


@paper.claim(
    "Gating removes shrinkage and reconstructs better with fewer latents",
    paper="Figure 1 and 'Gated SAEs resolve shrinkage': relative reconstruction bias of 1 where baseline "
    "autoencoders are below, at a better trade of loss recovered for L0",
    control="the L1 autoencoder of the same code at the same sparsity",
)
def no_shrinkage(lab: Lab) -> Verdict:
    """Train both at rising penalties; compare error and bias over L0."""
    gated = [
        trained(
            lab, sae.Gated(latents=256, penalty=penalty).build, f"gated, penalty {penalty:g}", steps=STEPS, beta1=0.0
        )
        for penalty in GATED
    ]
    plain = [
        trained(
            lab, sae.Standard(latents=256, penalty=penalty, warmup=0.1).build, f"L1, penalty {penalty:g}", steps=STEPS
        )
        for penalty in L1
    ]
    _draw(lab, gated, plain)
    lab.table(
        "What was trained",
        ["autoencoder", *COLUMNS],
        [
            *([f"gated, penalty {penalty:g}", *run.row] for penalty, run in zip(GATED, gated, strict=True)),
            *([f"L1, penalty {penalty:g}", *run.row] for penalty, run in zip(L1, plain, strict=True)),
        ],
    )
    ours, theirs = _nearest(gated), _nearest(plain)
    return lab.judge(
        checks={
            "gated: gamma within 3% of 1 at L0 near 5": abs(ours.quality.bias - 1) < 0.03,
            "both have an L0 within 1 of 5": max(abs(run.quality.l0 - MIDDLE) for run in (ours, theirs)) < 1,
            "gated: FVU below 0.35 there": ours.quality.fvu < 0.35,
            "L1: gamma below 0.6 there": theirs.quality.bias < 0.6,
            "L1: FVU above 0.5 there": theirs.quality.fvu > 0.5,
        },
        measured={
            "penalties": list(GATED),
            "L0": [run.quality.l0 for run in gated],
            "FVU": [run.quality.fvu for run in gated],
            "gamma": [run.quality.bias for run in gated],
            "mean best cosine": [run.recovery.mmcs for run in gated],
            "dead": [run.quality.dead for run in gated],
        },
        control={
            "penalties": list(L1),
            "L0": [run.quality.l0 for run in plain],
            "FVU": [run.quality.fvu for run in plain],
            "gamma": [run.quality.bias for run in plain],
            "mean best cosine": [run.recovery.mmcs for run in plain],
        },
        note=SETTING + " Mean ||x||^2 of 64; 4,000 steps; Adam's beta1 is 0 for the gated ones. Gamma is the factor by "
        "which reconstructions are too small: E||x'||^2 / E[x'.x].",
    )


def _draw(lab: Lab, gated: list[Trained], plain: list[Trained]) -> None:
    with lab.figure("shrinkage", figsize=(8.4, 3.4)) as figure:
        error, bias = figure.subplots(1, 2)
        for runs, color, label in ((plain, CONTROL, "L1"), (gated, COLORS[0], "gated")):
            points = sorted(runs, key=lambda run: run.quality.l0)
            l0 = [run.quality.l0 for run in points]
            error.plot(l0, [run.quality.fvu for run in points], color=color, marker="o", label=label)
            bias.plot(l0, [run.quality.bias for run in points], color=color, marker="o", label=label)
        bias.axhline(1.0, color=FAINT, linewidth=0.9, linestyle=":")
        error.set_title("Variance unexplained")
        bias.set_title("Size of reconstructions, \u03b3")
        for axes in (error, bias):
            axes.set_xlabel("latents on (L0)")
            axes.set_ylim(bottom=0)
            axes.legend()


@paper.claim(
    "The gate is a JumpReLU in other words, and its own reconstruction teaches no decoder",
    paper="'Gated SAEs' and its appendix on JumpReLU: with tied maps, f equals JumpReLU_theta with theta = b_mag - "
    "exp(r) b_gate; the auxiliary term uses a frozen copy of the decoder",
    kind="exact",
)
def gate_is_a_jump(lab: Lab) -> Verdict:
    """Compare with JumpReLU and ReLU, and look at the gradients of the auxiliary term, in float64."""
    torch.manual_seed(lab.seed)
    model = sae.Gated(latents=256, penalty=5.0).build(64)
    assert isinstance(model, GatedAutoencoder)
    model = model.double()
    x = sae.Planted(mean_square=64.0).draw(512, torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for parameter in (model.gate_bias, model.magnitude_bias, model.log_magnitude, model.decoder_bias):
            parameter.normal_(std=0.3)
        model.magnitude_bias.add_(2.0)
        theta = model.thresholds()
        centred = x - model.decoder_bias
        before = centred @ (model.log_magnitude.exp()[:, None] * model.encoder).T + model.magnitude_bias
        jump = float((model.encode(x) - torch.where(before > theta, before, 0)).abs().max())
        lowest = float(theta.min())
    with torch.no_grad():
        model.magnitude_bias.fill_(-1e6)  # nothing is on, so only the auxiliary term reconstructs
        model.decoder_bias.zero_()
    loss, _ = model.loss(x, 1.0)
    names = ("decoder", "encoder")
    gradients = dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True))
    through = float(gradients["decoder"].abs().max())
    teaches = float(gradients["encoder"].abs().max())
    with torch.no_grad():
        model.log_magnitude.zero_()
        model.gate_bias.normal_(std=0.3)
        model.magnitude_bias.copy_(model.gate_bias)
        relu = float((model.encode(x) - (x @ model.encoder.T + model.gate_bias).relu()).abs().max())
    count = sum(parameter.numel() for parameter in model.parameters())
    return lab.judge(
        checks={
            "f equals JumpReLU_theta where theta is not negative, to 1e-12": jump < 1e-12 and lowest >= 0,
            "the auxiliary term's gradient for the decoder is exactly 0": through == 0.0,
            "and not for the gate": teaches > 0,
            "r = 0 and equal biases make it a ReLU, to 1e-12": relu < 1e-12,
            "parameters: 2md + 3m + d": count == 2 * 256 * 64 + 3 * 256 + 64,
        },
        measured={
            "difference from JumpReLU": jump,
            "smallest theta": lowest,
            "decoder gradient of the auxiliary term": through,
            "gate gradient of the auxiliary term": teaches,
            "difference from ReLU": relu,
            "parameters": count,
        },
    )
