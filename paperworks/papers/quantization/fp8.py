"""FP8: eight bits with an exponent, which spare large numbers no resolution and small ones no zero."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paperworks.compress.format import WeightFormat
from paperworks.compress.formats.fp8 import DTYPES, FP8, LARGEST, cast, round_in_software
from paperworks.compress.formats.smoothquant import W8A8
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.papers.quantization._rounded_model import bench
from paperworks.papers.quantization.smoothquant import signal_to_noise
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
    equation=r"y = s_x s_w \left( \mathrm{fp8}(x / s_x) \, \mathrm{fp8}(W / s_w)^\top \right), \quad "
    r"s = \max |\cdot| / 448",
    usage="""
import torch
from paperworks import compress
from paperworks.compress.formats.fp8 import cast

print("E4M3 keeps", cast(torch.tensor([0.3, 30.0, 448.0]), "e4m3").float().tolist())
model = torch.nn.Sequential(torch.nn.Linear(512, 256))
x = torch.randn(32, 512)
exact = model(x)
out = compress.apply(model, compress.FP8(weights="tensor", activations="tensor"))(x)
print("relative error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Products are computed in float32 on numbers rounded to FP8, so nothing is faster here. Training in FP8, "
    "the larger half of the paper, is not built.",
)

FLOATING = FP8(weights="tensor", activations="tensor")
INTEGER = W8A8(weights="tensor", activations="tensor")


@paper.claim(
    "Behind loud channels eight bits do better with an exponent; on normal numbers integers do",
    paper="Abstract: post-training quantization to FP8 of language models that resisted fixed point int8",
    control="int8 with one scale a matrix, on the same matrices",
)
def an_exponent_bears_loud_channels(lab: Lab) -> Verdict:
    """Multiply random matrices in both formats, with 3 of 512 input channels 100 times louder, and with none."""
    rows = lab.pick(smoke=32, small=512)

    def arm(form: WeightFormat) -> Callable[[int], dict[str, float]]:
        def decibels(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            weight, quiet = torch.randn(rows, 512, generator=draws), torch.randn(rows, 512, generator=draws)
            loud = quiet.clone()
            loud[:, torch.randperm(512, generator=draws)[:3]] *= 100
            return {"dB, loud": signal_to_noise(form, weight, loud), "dB, normal": signal_to_noise(form, weight, quiet)}

        return decibels

    verdict = lab.compare(
        arms={"FP8": arm(FLOATING), "int8": arm(INTEGER)},
        main=Beats("FP8", "int8", on="dB, loud", by=5),
        also=[Beats("int8", "FP8", on="dB, normal", by=5)],
        seeds=10,
    )
    lab.points("dB, loud", name="loudness", title="Signal to noise of an eight-bit product behind loud channels")
    return verdict


@paper.claim(
    "SmolLM2 computes in FP8 with one scale a matrix, where int8 breaks it",
    paper="Abstract: post-training quantization to FP8 of language models that resisted fixed point int8; in the "
    "comparison arXiv:2409.11055 FP8 W8A8 stays close to full precision across sizes and tasks",
    control="int8 with one scale a matrix and one for its inputs, found at run time as well",
    reach="real",
)
def smollm2_computes_in_fp8(lab: Lab) -> Verdict:
    """Score SmolLM2 with FP8 and int8 products in all linear layers of its blocks."""
    bed = bench(lab, scored=2, length=256)
    verdict = lab.compare(
        arms={"FP8": bed.arm(FLOATING, decoded=False), "int8": bed.arm(INTEGER, decoded=False)},
        main=Beats("FP8", "int8", on="nats lost", by_ratio=0.8, lower=True),
        also=[AtMost("FP8", 0.02, on="nats lost")],
        seeds=3,
        note=PROVENANCE + bed.words + ". 0.02 nats are 2% of the perplexity.",
    )
    lab.points("perplexity", log=True, title="Perplexity of SmolLM2 with one scale a matrix")
    return verdict


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
