"""Every weight format on one instruction-tuned model: perplexity, divergence and changed predictions against bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import compress, train
from paperworks.compress import WeightFormat
from paperworks.compress.ggml_format import K_FALLBACKS
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers._smollm2 import PROVENANCE
from paperworks.papers.compression._rounded_smollm2 import Subject, subject

paper = Paper(
    key="quantized-instruct-eval",
    title="A Comprehensive Evaluation of Quantized Instruction-Tuned Large Language Models",
    authors="Lee, Park, Kwon, Oh, Kwon",
    year=2024,
    ref="arXiv:2409.11055",
    family="compression",
    summary=(
        "One table for all: one model in every format, the same calibration, the same text. Eight bits cost next to "
        "nothing, four bits little if the data have a say, and below three only codebooks and rotations hold."
    ),
    implements=("paperworks.compress.account.report",),
)


def _k_quant(kind: str) -> WeightFormat:
    return compress.GGML(kind=kind, fallback=K_FALLBACKS[kind])


# By line of the plot, formats of falling precision. Groups of 64: the width of 576 is no multiple of 128, and the
# weights at hand lie on grids of groups of 32.
LINES: dict[str, dict[str, WeightFormat]] = {
    "round to nearest": {f"RTN-{b}": compress.Uniform(bits=b, group=64) for b in (4, 3, 2)},
    "GPTQ": {f"GPTQ-{b}": compress.GPTQ(bits=b, group=64) for b in (4, 3, 2)},
    "AWQ": {f"AWQ-{b}": compress.AWQ(bits=b, group=64) for b in (4, 3)},
    "8 bits, activations too": {
        "int8": compress.LLMInt8(),
        "FP8": compress.FP8(),
        "SmoothQuant": compress.SmoothQuant(),
    },
    "k-quants": {kind: _k_quant(kind) for kind in ("Q6_K", "Q4_K", "Q2_K")},
    "4-bit codebooks": {"NF4": compress.NF4(double_quantization=True), "FP4": compress.FP4(double_quantization=True)},
    "lattices and codebooks": {"QuIP#-2": compress.QuIPSharp(bits=2), "AQLM-2": compress.AQLM()},
}
SMOKE = ("RTN-4", "RTN-3", "GPTQ-4", "AWQ-4", "int8", "FP8")
SMALL = (*SMOKE, "GPTQ-3", "NF4", "Q4_K")


@dataclass(frozen=True)
class Score:
    """What a format costs: bits a weight of the linear layers, and how far the model's predictions moved."""

    bits: float
    perplexity: float
    divergence: float  # mean KL(dense || rounded) of the next token, in nats
    flips: float  # share of tokens whose most likely successor changed


@torch.no_grad()
def _log_probabilities(known: Subject, model: nn.Module) -> list[Float[Tensor, "time vocab"]]:
    return [
        model(window[None])[0].log_softmax(-1) for window in known.tokens.split(known.context - 1) if len(window) > 1
    ]


def _score(known: Subject, dense: list[Tensor], format: WeightFormat) -> Score:
    model = known.rounded(format)
    bits = compress.report(model).bits_per_weight
    divergence, flips, count = 0.0, 0, 0
    for wanted, found in zip(dense, _log_probabilities(known, model), strict=True):
        divergence += float((wanted.exp() * (wanted - found)).sum())
        flips += int((wanted.argmax(-1) != found.argmax(-1)).sum())
        count += len(wanted)
    perplexity = train.perplexity(model, known.tokens, known.context)
    return Score(bits, perplexity, divergence / count, flips / count)


def pareto(scores: dict[str, Score]) -> list[str]:
    """Return the formats to which no other is at once smaller and better, from many bits to few."""
    best: list[str] = []
    for name in sorted(scores, key=lambda name: (scores[name].perplexity, scores[name].bits)):
        if not best or scores[name].bits < scores[best[-1]].bits:
            best.append(name)
    return best


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's correlation of two lists without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@paper.claim(
    "Formats order by bits, and at four bits by how much they learn from data",
    paper="Tables 2 to 5: AWQ best of the weight-only methods, then GPTQ; FP8 and 8 bits close to full precision",
    control="round to nearest in four and three bits, which learns nothing from data",
)
def one_table_for_all(lab: Lab) -> Verdict:
    """Round SmolLM2-135M-Instruct to each format and compare its predictions with its own before."""
    known = subject(lab)
    wanted = lab.pick(smoke=SMOKE, small=SMALL, large=tuple(name for line in LINES.values() for name in line))
    dense = _log_probabilities(known, known.model)
    before = known.perplexity()
    formats = {name: format for line in LINES.values() for name, format in line.items() if name in wanted}
    found = {name: _score(known, dense, format) for name, format in lab.track(list(formats.items()), "formats")}
    front = pareto(found)
    lab.table(
        "SmolLM2-135M-Instruct in every format",
        ["format", "bits a weight", "perplexity", "KL, nats", "changed predictions", "Pareto front"],
        [
            ["as loaded", "", before, 0.0, 0.0, ""],
            *(
                [name, x.bits, x.perplexity, x.divergence, f"{x.flips:.1%}", "yes" if name in front else ""]
                for name, x in sorted(found.items(), key=lambda item: -item[1].bits)
            ),
        ],
    )
    _draw(lab, found, front, before)
    kl = {name: score.divergence for name, score in found.items()}
    correlation = rank_correlation(list(kl.values()), [score.perplexity for score in found.values()])
    return lab.judge(
        checks={
            "KL: int8 and FP8 < AWQ-4, GPTQ-4 < RTN-4 < RTN-3": max(kl["int8"], kl["FP8"])
            < min(kl["AWQ-4"], kl["GPTQ-4"])
            and max(kl["AWQ-4"], kl["GPTQ-4"]) < kl["RTN-4"] < kl["RTN-3"],
            "AWQ-4 at most GPTQ-4": kl["AWQ-4"] <= kl["GPTQ-4"],
            "KL of RTN-3 at least 5 times that of GPTQ-4": kl["RTN-3"] >= 5 * kl["GPTQ-4"],
            "perplexity and KL agree on the order, rank correlation above 0.9": correlation > 0.9,
        },
        measured={f"KL, {name}": value for name, value in kl.items() if not name.startswith("RTN")}
        | {"rank correlation": correlation, "Pareto front": ", ".join(front)},
        control={"KL, RTN-4": kl["RTN-4"], "KL, RTN-3": kl["RTN-3"]},
        note=PROVENANCE + known.words + ". Multiple choice and format-constraint prompts of the paper are left out.",
    )


def _draw(lab: Lab, found: dict[str, Score], front: list[str], before: float) -> None:
    with lab.figure("bits", figsize=(7.2, 4.2)) as figure:
        axes = figure.subplots()
        for index, (line, formats) in enumerate(LINES.items()):
            points = [(found[name].bits, found[name].perplexity, name) for name in formats if name in found]
            if not points:
                continue
            color = CONTROL if line == "round to nearest" else COLORS[index % len(COLORS)]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=color, label=line)
            for x, y, name in points:
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.plot(
            [found[name].bits for name in front],
            [found[name].perplexity for name in front],
            "o",
            markersize=11,
            fillstyle="none",
            color="black",
            label="Pareto front",
        )
        axes.axhline(before, linewidth=0.8, linestyle=":", color="black")
        axes.set_yscale("log")
        axes.set_xlabel("bits a weight of the linear layers, scales and codebooks included")
        axes.set_title("Perplexity of SmolLM2 in each format (dotted: as loaded)")
        axes.legend(fontsize=7, frameon=False)


@paper.claim(
    "A format that rounds nothing moves no prediction, and four bits in groups of 128 take what arithmetic says",
    paper="Section 3: memory of each method; 4 + 32/128 bits with 16-bit scale and zero point",
    kind="exact",
)
def identity_and_arithmetic(lab: Lab) -> Verdict:
    """Store a model's layers as float32 blocks, and count the bits of a 4-bit layer."""
    torch.manual_seed(lab.seed)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(8, 256)
    before = model(x).log_softmax(-1)
    after = compress.apply(model, compress.GGML(kind="F32"), "*")(x).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum().detach())
    bits = compress.Uniform(bits=4, group=128).bits_per_weight((64, 256))
    return lab.judge(
        checks={
            "KL 0": divergence == 0.0,
            "no changed prediction": bool((before.argmax(-1) == after.argmax(-1)).all()),
            # zero points take four bits here, not sixteen
            "4 + (16 + 4)/128 bits": bits == 4 + 20 / 128,
        },
        measured={"KL": divergence, "bits": bits},
    )
