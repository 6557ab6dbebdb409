"""NF4: four bits a weight at the quantiles of a normal distribution, with scales quantized once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist, fmean

import torch
from torch import Tensor

from paperworks import compress
from paperworks.compress.formats.fourbit import NF4_CODES, FourBit
from paperworks.core.linear import weight_of
from paperworks.core.selection import select_linears
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._rounded_model import bench
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="nf4",
    title="QLoRA: Efficient Finetuning of Quantized LLMs (the NormalFloat data type)",
    authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
    year=2023,
    ref="arXiv:2305.14314",
    family="quantization",
    summary=(
        "Trained weights are nearly normal, so sixteen levels at the quantiles of a normal distribution, with a scale "
        "a block of 64, lose less than evenly spaced ones; quantizing the scales again saves 0.37 bits a weight."
    ),
    implements=(
        "paperworks.compress.formats.fourbit.NF4",
        "paperworks.compress.formats.fourbit.FP4",
        "paperworks.compress.formats.fourbit.Int4",
        "paperworks.compress.formats.blockwise.encode_scales",
    ),
    equation=r"q_i = \frac{1}{2} \left( \Phi^{-1}\left(\tfrac{i}{17}\right) + "
    r"\Phi^{-1}\left(\tfrac{i + 1}{17}\right) \right), \quad \hat w = s_b \, q_{c(w)}",
    usage="""
import torch
from paperworks import compress

model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
x = torch.randn(8, 512)
before = model(x)
compress.apply(model, compress.NF4(block=64, double_quantization=True))
print("bits a weight:", round(compress.report(model).bits_per_weight, 3))
print("largest change of an output:", float((model(x) - before).detach().abs().max()))
""",
    notes="The levels are those of bitsandbytes: equally spaced quantiles on each side of an exact zero.",
)

FORMATS: dict[str, FourBit] = {
    "NF4": compress.NF4(),
    "NF4, double": compress.NF4(double_quantization=True),
    "int4": compress.Int4(),
    "FP4": compress.FP4(),
}


@paper.claim(
    "SmolLM2 in NF4 loses less than in int4 of the same size",
    paper="Table 2: mean Pile perplexity over models 34.34 for Int4, 31.07 for FP4 (E2M1), 27.41 for NFloat4 + DQ",
    control="int4: evenly spaced levels, the same 64 weights a scale, the same bits",
    reach="real",
    tour=2,
)
def loses_less_than_int4(lab: Lab) -> Verdict:
    """Score SmolLM2 before and after rounding all linear layers of its blocks to each format."""
    bed = bench(lab)
    verdict = lab.compare(
        arms={"NF4": bed.arm(FORMATS["NF4"]), "int4": bed.arm(FORMATS["int4"])},
        main=Beats("NF4", "int4", on="nats lost", by_ratio=0.2, lower=True),
        also=[Beats("NF4", "int4", on="perplexity", lower=True)],
        seeds=3,
        measured={"perplexity, as loaded, seed 0": math.exp(bed.dense_loss(lab.seed))},
        note=PROVENANCE + bed.words + ". The paper's 34.34 to 27.41 is 0.23 nats less a token.",
    )
    lab.points("nats lost", title="What SmolLM2 loses when its layers are rounded to 4.5 bits, nats a token")
    return verdict


@paper.claim(
    "NF4 has the least error on SmolLM2's matrices because weights are nearly normal, and double quantization is free",
    paper="Section 3: NF4 is information-theoretically optimal for zero-centred normal weights; Appendix F: trained "
    "weights are mostly normal",
    control="int4, with as many bits; and evenly distributed numbers, where int4 has to win",
    reach="real",
)
def least_error_on_normal_weights(lab: Lab) -> Verdict:
    """Measure the error of each codebook on drawn matrices of SmolLM2, on normal and on evenly distributed numbers."""
    bed = bench(lab)
    layers = select_linears(bed.model, bed.targets)
    count = lab.pick(smoke=1, small=20, large=210)

    def arm(format: FourBit) -> Callable[[int], dict[str, float]]:
        def errors(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            order = torch.randperm(len(layers), generator=draws)[:count].tolist()
            matrices = [weight_of(list(layers.values())[index]) for index in order]
            return {
                "error on SmolLM2's weights": fmean(_error(format, matrix) for matrix in matrices),
                "error on normal numbers": _error(format, torch.randn(1024, 1024, generator=draws)),
                "error on even numbers": _error(format, 2 * torch.rand(1024, 1024, generator=draws) - 1),
            }

        return errors

    trained, normal, even = "error on SmolLM2's weights", "error on normal numbers", "error on even numbers"
    verdict = lab.compare(
        arms={name: arm(format) for name, format in FORMATS.items()},
        # On normal numbers the codebooks' errors are 0.00846 and 0.0116: 27% less.
        main=Beats("NF4", "int4", on=trained, by_ratio=0.2, lower=True),
        also=[
            Beats("int4", "FP4", on=trained, lower=True),
            Within("NF4", "NF4, double", on=trained, by_ratio=0.02),
            Beats("NF4", "int4", on=normal, by_ratio=0.25, lower=True),
            Beats("int4", "NF4", on=even, by_ratio=0.1, lower=True),
        ],
        seeds=3,
        note=PROVENANCE + f"Squared error relative to the mean square; {count} of {len(layers)} matrices a seed.",
    )
    lab.points(trained, title="Squared error of four-bit codebooks on SmolLM2's weights, relative")
    return verdict


@torch.no_grad()
def _error(format: FourBit, weight: Tensor) -> float:
    """Mean (x - rounded x)^2 / mean x^2 of a codebook."""
    rounded = format.decode(format.encode(weight), (weight.shape[0], weight.shape[1]))
    return ((weight - rounded).double().square().mean() / weight.double().square().mean()).item()


@paper.claim(
    "The sixteen levels are the quantiles of a normal distribution, with an exact zero",
    paper="Section 3 and Appendix E: q_i from equally spaced quantiles on each side, joined at zero, scaled to [-1, 1]",
    kind="exact",
)
def levels_are_normal_quantiles(lab: Lab) -> Verdict:
    """Construct the codebook in float64 from the inverse normal distribution and compare."""
    built = _built_codebook()
    differences = [abs(ours - known) for ours, known in zip(NF4_CODES, built, strict=True)]
    lab.table(
        "The codebook",
        ["code", "level", "from the quantiles", "difference"],
        [[code, NF4_CODES[code], built[code], differences[code]] for code in range(16)],
    )
    return lab.judge(
        checks={
            # The published constants start from probabilities in float32: half a step below 1 is 3e-8, which the
            # density there (0.072) and the division by the outermost quantile (1.85) make 2.2e-7, and one rounding.
            "equal to the construction, to 3e-7": max(differences) < 3e-7,
            "ascending": list(NF4_CODES) == sorted(set(NF4_CODES)),
            "with 0, -1 and 1 exact": {-1.0, 0.0, 1.0} <= set(NF4_CODES),
            "and one more level above zero than below": sum(x > 0 for x in NF4_CODES) == 8,
        },
        measured={"largest difference": max(differences), "levels": len(NF4_CODES)},
    )


def _built_codebook() -> list[float]:
    """Seven negative levels, zero and eight positive ones, from equally spaced probabilities on each side."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the outermost quantile: halfway between those of 2^4 and 2^4 - 1 levels
    quantile = NormalDist().inv_cdf

    def side(levels: int) -> list[float]:
        return [quantile(offset + (0.5 - offset) * step / levels) for step in range(levels)]

    positive, negative = side(8), [-x for x in side(7)]
    top = max(positive)
    return sorted(x / top for x in [*positive, 0.0, *negative])


@paper.claim(
    "A weight takes 4.5 bits, 4.127 with double quantization, and rounding twice changes nothing",
    paper="Section 3: the constants take 32/64 = 0.5 bits a parameter, 8/64 + 32/(64 256) = 0.127 with double "
    "quantization, a saving of 0.373",
    kind="exact",
)
def storage_and_idempotence(lab: Lab) -> Verdict:
    """Count the stored bytes of a matrix, and round an already rounded one again."""
    side = lab.pick(smoke=512, small=2048)
    weight = torch.randn(side, side, generator=lab.generator(lab.seed))
    stored = {name: FORMATS[name].encode(weight) for name in FORMATS}
    bits = {name: 8 * sum(x.nbytes for x in tensors.values()) / weight.numel() for name, tensors in stored.items()}
    once = {name: FORMATS[name].decode(stored[name], (side, side)) for name in FORMATS}
    twice = {
        name: FORMATS[name].decode(FORMATS[name].encode(once[name]), (side, side)) for name in ("NF4", "int4", "FP4")
    }
    expected = 4 + 8 / 64 + 32 / (64 * 256)
    mean_of_scales = 32 / weight.numel()  # one float32 a matrix, which the paper's sum leaves out
    return lab.judge(
        checks={
            "4.5 bits without double quantization": bits["NF4"] == 4 + 32 / 64,
            "4.12695 bits with it, and the one number a matrix": abs(bits["NF4, double"] - expected - mean_of_scales)
            < 1e-9,
            "what the format says it takes is what it stores": all(
                FORMATS[name].bits_per_weight((side, side)) == bits[name] for name in FORMATS
            ),
            "rounding a rounded matrix changes no bit": all(torch.equal(once[name], twice[name]) for name in twice),
        },
        measured={
            "bits, NF4": bits["NF4"],
            "bits, double quantization": bits["NF4, double"],
            "saved": bits["NF4"] - bits["NF4, double"],
            "weights changed by rounding twice": sum(int((once[name] != twice[name]).sum()) for name in twice),
        },
    )
