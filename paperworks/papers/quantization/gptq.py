"""GPTQ: round a weight column by column, and let the columns that are left make up for each error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paperworks.compress import GPTQ, Uniform
from paperworks.compress.calibration.feedback import feed_back, upper_factor
from paperworks.compress.calibration.statistics import Statistics
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._calibrated_layers import ENERGY, energy_lost
from paperworks.papers.quantization._rounded_model import bench
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="gptq",
    title="GPTQ: Accurate Post-training Quantization for Generative Pre-trained Transformers",
    authors="Frantar, Ashkboos, Hoefler, Alistarh",
    year=2022,
    ref="arXiv:2210.17323",
    family="quantization",
    summary=(
        "A layer's outputs, not its weights, are to be kept: rounded in turn, each column passes its error on to the "
        "columns after it, weighted by how inputs correlate. Three and four bits become usable, without training."
    ),
    implements=(
        "paperworks.compress.formats.gptq.GPTQ",
        "paperworks.compress.calibration.feedback.feed_back",
        "paperworks.compress.calibration.feedback.upper_factor",
    ),
    equation=r"\min_Q \lVert W X - Q X \rVert^2: \quad W_{:,k+1:} \leftarrow W_{:,k+1:} - "
    r"\frac{W_{:,k} - Q_{:,k}}{[H^{-1}]_{kk}} [H^{-1}]_{k,k+1:}, \quad H = X X^\top",
    usage="""
import torch
from paperworks import compress

torch.manual_seed(0)
texts = [torch.randn(256, 64) @ torch.randn(64, 512) for _ in range(4)]  # inputs that correlate
for format in (compress.Uniform(bits=4, group=None), compress.GPTQ(bits=4, group=None, act_order=True)):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256))
    exact = model(texts[0])
    out = compress.apply(model, format, calibration=texts)(texts[0])
    print(type(format).__name__, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="In the inputs' own order the first token, on which heads rest, errs more than with round to nearest: "
    "it is rare in the second moment. `act_order` mends that, and so does calibrating on more first tokens.",
)

ROUNDED = Uniform(bits=4, group=None)
CORRECTED = GPTQ(bits=4, group=None, act_order=True)  # a grid a row is static: chosen before the first column


@paper.claim(
    "Passing errors on keeps much of SmolLM2's perplexity at four bits a weight",
    paper="Table 3: OPT-175B on WikiText2 8.34; 10.54 with 4-bit round to nearest, 8.37 with GPTQ",
    control="round to nearest on grids of the same kind",
    reach="real",
)
def keeps_perplexity_at_four_bits(lab: Lab) -> Verdict:
    """Round the linear layers of SmolLM2's blocks to nearest, and by GPTQ block after block, large inputs first."""
    bed = bench(lab, calibrated=5)
    verdict = lab.compare(
        arms={"GPTQ": bed.arm(CORRECTED), "round to nearest": bed.arm(ROUNDED)},
        main=Beats("GPTQ", "round to nearest", on="nats lost", by_ratio=0.3, lower=True),
        seeds=3,
        note=PROVENANCE + bed.words + ". A scale a row; act order, with scales chosen before the first column.",
    )
    lab.points("nats lost", title="What SmolLM2 loses at four bits and a scale a row, nats a token")
    return verdict


@paper.claim(
    "The layers' output errors are far below those of round to nearest",
    paper="Section 3: the objective is the squared error of the layer's outputs",
    control="round to nearest on the same grids, judged by the same inputs",
    reach="real",
)
def layers_err_less(lab: Lab) -> Verdict:
    """Round linear layers of SmolLM2 behind the inputs they have on text, and compare squared output errors."""
    bed = bench(lab, blocks=(0, 14, 29))
    forms = {
        "GPTQ": CORRECTED,
        "in the inputs' order": GPTQ(bits=4, group=None),
        "round to nearest": ROUNDED,
        "GPTQ, 3 bits in groups of 64": GPTQ(bits=3, group=64, act_order=True, static_groups=True),
        "round to nearest, 3 bits in groups of 64": Uniform(bits=3, group=64),
    }
    names = list(forms)
    verdict = lab.compare(
        arms={name: energy_lost(bed, form) for name, form in forms.items()},
        main=Beats(names[0], names[2], on=ENERGY, by_ratio=0.5, lower=True),
        also=[
            Beats(names[3], names[4], on=ENERGY, by_ratio=0.5, lower=True),
            Within(names[0], names[1], on=ENERGY, by_ratio=0.25, lower=True),
        ],
        seeds=3,
        note=PROVENANCE + f"Four bits and a scale a row, where not said otherwise. All linear layers of blocks 0, 14 "
        f"and 29; inputs from {bed.calibrated} windows of {bed.length} tokens, on which the errors are measured too.",
    )
    lab.points(ENERGY, log=True, title="Share of the outputs' energy that rounding loses, mean over layers")
    return verdict


@paper.claim(
    "On correlated inputs the error falls to less than half, at two, three and four bits",
    paper="Section 4: compensating errors through the inverse Hessian",
    control="round to nearest; and inputs without correlation, where there is nothing to make up with",
)
def correlation_is_what_helps(lab: Lab) -> Verdict:
    """Round a random matrix behind inputs whose second moment has a condition of 1000, and of 1."""
    size = lab.pick(smoke=48, small=256)

    def arm(form: type[Uniform]) -> Callable[[int], dict[str, float]]:
        def errors(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            weight = torch.randn(size, size, generator=draws)
            basis = torch.linalg.qr(torch.randn(size, size, generator=draws)).Q
            noise = torch.randn(16 * size, size, generator=draws)
            correlated = noise * torch.logspace(0, -1.5, size) @ basis.T

            def error(bits: int, x: torch.Tensor) -> float:
                chosen = form(bits=bits, group=None)
                rounded = chosen.decode(chosen.encode(weight, Statistics.of(x, ("second_moment",))), (size, size))
                return float(((rounded - weight) @ x.T).square().sum() / (weight @ x.T).square().sum())

            found = {f"squared error, {bits} bits": error(bits, correlated) for bits in (2, 3, 4)}
            return found | {"squared error, 4 bits, not correlated": error(4, noise)}

        return errors

    metrics = [f"squared error, {bits} bits" for bits in (4, 3, 2)]
    return lab.compare(
        arms={"GPTQ": arm(GPTQ), "round to nearest": arm(Uniform)},
        main=Beats("GPTQ", "round to nearest", on=metrics[0], by_ratio=0.5, lower=True),
        also=[
            *(Beats("GPTQ", "round to nearest", on=metric, by_ratio=0.5, lower=True) for metric in metrics[1:]),
            Within("GPTQ", "round to nearest", on="squared error, 4 bits, not correlated", by_ratio=0.2),
        ],
        seeds=5,
    )


@paper.claim(
    "It is optimal brain quantization in a fixed order, whatever the block size; uncorrelated, round to nearest",
    paper="Section 4, steps 1 to 3: arbitrary order, lazy batch updates, Cholesky reformulation",
    kind="exact",
)
def equals_optimal_brain_quantization(lab: Lab) -> Verdict:
    """Eliminate one weight after the other from the inverse Hessian in float64, and compare with the loop."""
    draws = lab.generator(lab.seed)
    weight, x = torch.randn(16, 24, generator=draws).double(), torch.randn(64, 24, generator=draws).double()
    hessian = x.T @ x / len(x)
    current, inverse, expected = weight.clone(), torch.linalg.inv(hessian), torch.empty_like(weight)
    for k in range(24):
        expected[:, k] = (2 * current[:, k]).round() / 2
        current -= ((current[:, k] - expected[:, k]) / inverse[k, k])[:, None] * inverse[k]
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    factor = upper_factor(hessian, damping=0.0)
    found = {
        block: feed_back(weight, factor, lambda k, column: (2 * column).round() / 2, block=block)
        for block in (1, 7, 128)
    }
    apart = max(float((result - expected).abs().max()) for result in found.values())
    wide, neutral = torch.randn(16, 64, generator=draws), Statistics.neutral(64)
    changed = sum(
        int((left != right).sum())
        for bits in (2, 3, 4, 8)
        for left, right in zip(
            GPTQ(bits=bits, group=16).encode(wide, neutral).values(),
            Uniform(bits=bits, group=16).encode(wide).values(),
            strict=True,
        )
    )
    return lab.judge(
        checks={
            "equal to the elimination, to 1e-9": apart < 1e-9,
            "every stored number is that of round to nearest where inputs are uncorrelated": changed == 0,
        },
        measured={"largest difference": apart, "stored numbers that differ": changed},
    )
