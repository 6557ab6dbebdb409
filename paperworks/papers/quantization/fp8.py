"""FP8: eight bits with an exponent, which spare large numbers no resolution and small ones no zero."""

from __future__ import annotations

import torch

from paperworks.compress.formats.fp8 import DTYPES, FP8, LARGEST, cast, round_in_software
from paperworks.compress.formats.smoothquant import W8A8
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS
from paperworks.papers.quantization.smoothquant import signal_to_noise
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="fp8",
    title="FP8 Formats for Deep Learning",
    authors="Micikevicius, Stosic, Burgess, Cornea, Dubey, Grisenthwaite, Ha, Heinecke, Judd, Kamalu, and others",
    year=2022,
    ref="arXiv:2209.05433",
    family="quantization",
    summary=(
        "Four bits of exponent and three of mantissa for weights and activations, five and two for gradients: relative "
        "instead of absolute precision, so that loud channels do not drown the others."
    ),
    implements=(
        "paperworks.compress.formats.fp8.FP8",
        "paperworks.compress.formats.fp8.cast",
        "paperworks.compress.formats.fp8.round_in_software",
    ),
)

FLOATING = FP8(weights="tensor", activations="tensor")
INTEGER = W8A8(weights="tensor", activations="tensor")


@paper.claim(
    "Behind loud channels eight bits do better with an exponent; on normal numbers integers do",
    paper="Section 3 and arXiv:2409.11055: FP8 is the most consistent of the W8A8 formats",
    control="int8 with one scale a matrix, on the same matrices",
)
def an_exponent_bears_loud_channels(lab: Lab) -> Verdict:
    """Multiply random matrices in both formats, with 3 of 512 input channels up to 100 times louder."""
    draws = torch.Generator().manual_seed(lab.seed)
    weight = torch.randn(lab.pick(smoke=32, small=512), 512, generator=draws)
    quiet = torch.randn(lab.pick(smoke=64, small=512), 512, generator=draws)
    factors = (1.0, 3.0, 10.0, 30.0, 100.0)
    curves: dict[str, list[float]] = {"FP8": [], "int8": []}
    for factor in factors:
        x = quiet.clone()
        x[:, [7, 100, 400]] *= factor
        for name, form in (("FP8", FLOATING), ("int8", INTEGER)):
            curves[name].append(signal_to_noise(form, weight, x))
    with lab.figure("loudness", figsize=(7.2, 2.8)) as figure:
        axes = figure.subplots()
        for (name, curve), color in zip(curves.items(), COLORS, strict=False):
            axes.semilogx(factors, curve, "o-", color=color, label=name)
        axes.set_ylim(0)
        axes.set_xlabel("how many times louder three of 512 channels are")
        axes.set_ylabel("decibels")
        axes.set_title("Signal to noise of a product of two eight-bit matrices")
        axes.legend()
    return lab.judge(
        checks={
            "5 dB more than int8 behind loud channels": curves["FP8"][-1] >= curves["int8"][-1] + 5,
            "less than int8 on normal numbers": curves["FP8"][0] < curves["int8"][0],
        },
        measured={"dB, FP8, loud": curves["FP8"][-1], "dB, FP8, normal": curves["FP8"][0]},
        control={"dB, int8, loud": curves["int8"][-1], "dB, int8, normal": curves["int8"][0]},
    )


@paper.claim(
    "SmolLM2 computes in FP8 with one scale a matrix",
    paper="arXiv:2409.11055: FP8 W8A8 stays close to full precision across sizes and tasks",
    control="int8 with one scale a matrix and one for its inputs, found at run time as well",
)
def smollm2_computes_in_fp8(lab: Lab) -> Verdict:
    """Score SmolLM2 with FP8 and int8 products in all linear layers of its blocks."""
    known = subject(lab)
    dense = known.perplexity()
    floating, integer = (known.perplexity(form, decoded=False) for form in (FLOATING, INTEGER))
    return lab.judge(
        checks={
            "perplexity rises by less than 2%": floating / dense - 1 < 0.02,
            "less than with int8": floating < integer,
        },
        measured={"perplexity, FP8": floating, "perplexity, as loaded": dense},
        control={"perplexity, int8": integer},
        note=PROVENANCE + known.words + ".",
    )


@paper.claim(
    "The cast is exact arithmetic: the same bits as the type's own, half a step at most",
    paper="Table 1: E4M3 up to 448 and from 2^-9, E5M2 up to 57344 and from 2^-16",
    kind="exact",
)
def the_cast_is_exact(lab: Lab) -> Verdict:
    """Round every finite float16 in software and by torch's own type; and look at all 256 codes."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    x = x[torch.isfinite(x)]
    off, worst, counts = 0, {}, {}
    for kind, dtype in DTYPES.items():
        off += int((round_in_software(x, kind).view(torch.int32) != cast(x, kind).float().view(torch.int32)).sum())
        normal = x[(x.abs() >= {"e4m3": 2.0**-6, "e5m2": 2.0**-14}[kind]) & (x.abs() <= LARGEST[kind])]
        worst[kind] = float(((cast(normal, kind).float() - normal) / normal).abs().max())
        values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        positive = values[torch.isfinite(values) & (values > 0)]
        counts[kind] = (len(positive), float(positive.min()), float(positive.max()))
    return lab.judge(
        checks={
            "no float16 is rounded otherwise": off == 0,
            "E4M3 errs by at most 2^-4": worst["e4m3"] <= 2**-4,
            "E5M2 errs by at most 2^-3": worst["e5m2"] <= 2**-3,
            "126 positive numbers from 2^-9 to 448": counts["e4m3"] == (126, 2.0**-9, 448.0),
            "123 positive numbers from 2^-16 to 57344": counts["e5m2"] == (123, 2.0**-16, 57344.0),
        },
        measured={"rounded otherwise": off, "largest relative error, E4M3": worst["e4m3"], "E5M2": worst["e5m2"]},
    )
