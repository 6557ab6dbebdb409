"""AQLM: groups of weights as sums of learned vectors, chosen for what the layer puts out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.additive_codes import beam_search, cluster, reconstruct, tune_values
from paperworks.compress.formats.aqlm import AQLM
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.papers.quantization._calibrated_layers import ENERGY, calibrated_layers, energy_lost
from paperworks.papers.quantization._rounded_model import bench
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="aqlm",
    title="Extreme Compression of Large Language Models via Additive Quantization",
    authors="Egiazarian, Panferov, Kuznedelev, Frantar, Babenko, Alistarh",
    year=2024,
    ref="arXiv:2401.06118",
    family="quantization",
    summary=(
        "Eight weights at a time become a sum of two learned vectors; codes are searched and vectors trained for the "
        "error of the layer's output instead of the weights', which makes two bits a weight usable."
    ),
    implements=(
        "paperworks.compress.formats.aqlm.AQLM",
        "paperworks.compress.formats.additive_codes.beam_search",
        "paperworks.compress.calibration.tuning.tune_block",
    ),
    equation=r"\hat W_{i,j} = s_i \sum_{m=1}^{M} C_m b_{i,j,m}, \quad "
    r"\min_{C, b, s} \lVert W X - \hat W X \rVert^2",
    usage="""
import torch
from paperworks import compress

torch.manual_seed(0)
texts = [torch.randn(256, 64) @ torch.randn(64, 576) for _ in range(4)]  # inputs that correlate
for format in (compress.GPTQ(bits=2, group=None), compress.AQLM(codebooks=2, bits=6)):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(576, 192))
    model[0].weight.data = torch.distributions.StudentT(3.0).sample((192, 576))  # heavy tails
    exact = model(texts[0])
    out = compress.apply(model, format, calibration=texts)(texts[0])
    print(type(format).__name__, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Codebooks serve one matrix, so small matrices pay for them: SmolLM2's key takes 2.6 bits a weight at 2x8.",
)


@paper.claim(
    "Searching codes for the layer's output loses less than clustering the weights, and than GPTQ",
    paper="Section 3 and Table 1: AQLM against GPTQ and others near 2 bits; Appendix: initialization by residual "
    "k-means, then beam search and Adam on ||W X - What X||^2",
    control="residual k-means of the weights, which the method starts from; and GPTQ with a grid a row at 2 bits",
    reach="real",
)
def search_beats_clustering(lab: Lab) -> Verdict:
    """Round key and value of a block of SmolLM2 with two codebooks of 256; compare before and after the loop."""
    bed = bench(lab, blocks=(14,), part="mixer.{key,value}")
    form = AQLM(bits=lab.pick(smoke=4, small=8), epochs=lab.pick(smoke=1, small=4))
    ours, start, gptq = "AQLM", "residual k-means", "GPTQ, 2 bits"
    verdict = lab.compare(
        arms={
            ours: energy_lost(bed, form),
            start: energy_lost(bed, replace(form, epochs=0)),
            gptq: energy_lost(bed, lambda layer: layer.loss_by_row(2, feedback=True)),
        },
        main=Beats(ours, start, on=ENERGY, by_ratio=0.2, lower=True),
        also=[Beats(ours, gptq, on=ENERGY, by_ratio=0.3, lower=True)],
        seeds=3,
        measured={"bits a weight with codebooks and scales": form.bits_per_weight((192, 576))},
        note=PROVENANCE
        + f"Key and value of block 14; inputs from {bed.calibrated} windows of {bed.length} tokens drawn "
        "by the seed. The codebooks of so small a matrix weigh 0.6 bits a weight, in one of 4,096 x 4,096 "
        "0.004. GPTQ: a grid a row from the least to the largest weight.",
    )
    lab.points(ENERGY, log=True, title="Share of the outputs' energy lost near two bits, mean over layers")
    return verdict


@paper.claim(
    "No phase raises the loss",
    paper="Section 3: each phase minimises the same objective with the rest fixed",
    kind="exact",
)
def no_phase_raises_the_loss(lab: Lab) -> Verdict:
    """Alternate Adam and beam search by hand on a layer of SmolLM2, and measure after every phase."""
    (layer,) = calibrated_layers(bench(lab, blocks=(14,), part="mixer.key"), lab.seed)
    weight, moment = layer.weight, layer.statistics.required("second_moment")
    moment = moment / moment.diagonal().mean()
    scales = weight.square().mean(1).sqrt()
    draws = lab.generator(lab.seed)
    books, codes = cluster((weight / scales[:, None]).reshape(-1, 8), 2, 32, 10, draws)
    codes = codes.view(len(scales), -1, 2)

    def loss() -> float:
        rounded = reconstruct(codes, books, scales)
        return layer.loss(rounded)

    losses = [loss()]
    for _ in range(4):
        books, scales, _ = tune_values(weight, moment, books, scales, codes, 20, 6.4e-3)
        losses.append(loss())
        codes = beam_search(weight, moment, books, scales, codes)
        losses.append(loss())
    rises = [after - before for before, after in pairwise(losses)]
    return lab.judge(
        checks={
            # sums of some 10^4 float32 products, relative to their total
            "no phase raises it, to 1e-6": max(rises) < 1e-6,
            "training the values lowers it, every time": max(rises[0::2]) < 0,
            "so does searching the codes": max(rises[1::2]) < 0,
        },
        measured={"losses": losses, "largest rise": max(rises)},
    )


@paper.claim(
    "2x8 takes 2.0078 bits and 1x16 2.5039 bits in a matrix of 4,096 x 4,096",
    paper="Appendix: average bits = codes + codebooks + scales",
    kind="exact",
)
def bits_with_codebooks(lab: Lab) -> Verdict:
    """Compute the storage from the format, and count that of a matrix that was encoded."""
    small = AQLM(bits=5, epochs=0)
    weight = torch.randn(64, 64, generator=lab.generator(lab.seed))
    stored = small.encode(weight, Statistics.neutral(64))
    counted = 8 * sum(tensor.nbytes for tensor in stored.values()) / weight.numel()
    found = {
        "2x8, 4096 x 4096": AQLM().bits_per_weight((4096, 4096)),
        "1x16, 4096 x 4096": AQLM(codebooks=1, bits=16).bits_per_weight((4096, 4096)),
        "2x8, SmolLM2's feed-forward, 1536 x 576": AQLM().bits_per_weight((1536, 576)),
        "2x8, SmolLM2's query, 576 x 576": AQLM().bits_per_weight((576, 576)),
        "2x8, SmolLM2's key, 192 x 576": AQLM().bits_per_weight((192, 576)),
    }
    lab.table("Bits a weight, codebooks and scales included", ["matrix", "bits"], [[*item] for item in found.items()])
    return lab.judge(
        checks={
            "2.0078 for 2x8": round(found["2x8, 4096 x 4096"], 4) == 2.0078,
            "2.5039 for 1x16": round(found["1x16, 4096 x 4096"], 4) == 2.5039,
            "the format stores what it says": counted == small.bits_per_weight((64, 64)),
        },
        measured=found,
    )
