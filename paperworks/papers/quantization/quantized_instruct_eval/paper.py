"""Every weight format on one instruction-tuned model: perplexity, divergence and changed predictions against bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

import paperworks as pw
from paperworks import api, compress
from paperworks.lab import Lab, Paper, Verdict
from paperworks.papers.quantization.quantized_instruct_eval.format_prompts import prompts
from paperworks.papers.quantization.quantized_instruct_eval.format_table import (
    Score,
    draw,
    lines,
    rank_correlation,
    scored,
    show,
)
from paperworks.testbeds.characters import character_llama, play, trained
from paperworks.testbeds.choices import choices
from paperworks.testbeds.rounded_smollm2 import Subject, subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="quantized-instruct-eval",
    title="A Comprehensive Evaluation of Quantized Instruction-Tuned Large Language Models",
    authors="Lee, Park, Kwon, Oh, Kwon",
    year=2024,
    ref="arXiv:2409.11055",
    family="quantization",
    summary=(
        "One table for all: one model in every format, the same calibration, the same text. Eight bits cost next to "
        "nothing, four bits little if the data have a say, and below three only codebooks and rotations hold."
    ),
    implements=("paperworks.compress.account.report",),
)

# The width of 576 is no multiple of 128, and the weights at hand lie on grids of groups of 32: groups of 64.
GROUP = 64
EIGHT_AND_FOUR = ("int8", "FP8", "SmoothQuant", "Q6_K", "RTN-4", "GPTQ-4", "AWQ-4", "NF4", "FP4", "Q4_K")
THREE = ("RTN-3", "GPTQ-3", "AWQ-3", "Q3_K")
TWO = ("RTN-2", "GPTQ-2", "Q2_K", "QuIP#-2")

# What was scored in this process, by what it depends on: a format that two claims need is done once, and the last claim
# draws all of them.
_SCORED: dict[tuple[str, int], dict[str, Score]] = {}


def _scores(lab: Lab, names: Sequence[str]) -> tuple[dict[str, Score], Subject, str]:
    """Return the scores of formats on SmolLM2 as a whole, those of earlier claims included, and the data in words."""
    known = subject(lab)
    asked, words = choices(known.tokenizer, lab.pick(smoke=2, small=60, large=500), lab.seed)
    done = _SCORED.setdefault((lab.scale, lab.seed), {})
    formats = {name: form for line in lines(GROUP).values() for name, form in line.items()}
    missing = {name: formats[name] for name in names if name not in done}
    done |= scored(lab, known, missing, asked)
    note = PROVENANCE + f"{known.words}; {words}. Groups of {GROUP} where a format has groups."
    return done, known, note


def _only(found: dict[str, Score], names: Sequence[str]) -> dict[str, Score]:
    return {name: found[name] for name in ("as loaded", *names)}


@paper.claim(
    "Formats order by bits, and at four bits by how much they learn from data",
    paper="Tables 2 to 5: AWQ best of the weight-only methods, then GPTQ; FP8 and 8 bits close to full precision",
    control="round to nearest in four bits, which learns nothing from data",
)
def one_table_for_all(lab: Lab) -> Verdict:
    """Round SmolLM2-135M-Instruct to each format and compare its predictions with its own before."""
    names = lab.pick(smoke=("int8", "FP8", "RTN-4", "GPTQ-4", "AWQ-4"), small=EIGHT_AND_FOUR)
    found, _, note = _scores(lab, names)
    found = _only(found, names)
    show(lab, "SmolLM2-135M-Instruct in four bits and more", found)
    kl = {name: score.divergence for name, score in found.items()}
    rounded = [score for name, score in found.items() if name != "as loaded"]
    correlation = rank_correlation([x.divergence for x in rounded], [x.perplexity for x in rounded])
    return lab.judge(
        checks={
            "KL: int8 and FP8 < AWQ-4 and GPTQ-4 < RTN-4": max(kl["int8"], kl["FP8"])
            < min(kl["AWQ-4"], kl["GPTQ-4"])
            <= max(kl["AWQ-4"], kl["GPTQ-4"])
            < kl["RTN-4"],
            "AWQ-4 at most GPTQ-4": kl["AWQ-4"] <= kl["GPTQ-4"],
            "perplexity and KL agree on the order, rank correlation above 0.9": correlation > 0.9,
        },
        measured={f"KL, {name}": value for name, value in kl.items() if name not in ("RTN-4", "as loaded")}
        | {"perplexity, GPTQ-4": found["GPTQ-4"].perplexity, "perplexity, AWQ-4": found["AWQ-4"].perplexity}
        | {"rank correlation": correlation},
        control={"KL, RTN-4": kl["RTN-4"], "perplexity, RTN-4": found["RTN-4"].perplexity},
        note=note,
    )


@paper.claim(
    "Three bits rounded to nearest are far worse than four that learned from data; learning makes up for most of it",
    paper="Section 4: drops grow below four bits; GPTQ's paper, Table 4: 3 bits usable with GPTQ only",
    control="round to nearest in three bits",
)
def three_bits(lab: Lab) -> Verdict:
    """Compare SmolLM2 in three bits, rounded in four ways, with GPTQ in four."""
    names = lab.pick(smoke=("RTN-3", "GPTQ-3"), small=THREE)
    found, _, note = _scores(lab, (*names, "GPTQ-4"))
    found = _only(found, (*names, "GPTQ-4"))
    show(lab, "SmolLM2-135M-Instruct in three bits", found)
    return lab.judge(
        checks={
            "KL of RTN-3 at least 5 times that of GPTQ-4": found["RTN-3"].divergence >= 5 * found["GPTQ-4"].divergence,
            "GPTQ-3 nearer to the model than RTN-3": found["GPTQ-3"].divergence < found["RTN-3"].divergence,
        },
        measured={f"KL, {name}": found[name].divergence for name in (*names, "GPTQ-4") if name != "RTN-3"},
        control={"KL, RTN-3": found["RTN-3"].divergence},
        note=note,
    )


@paper.claim(
    "In two bits a lattice behind a rotation holds where grids do not",
    paper="QuIP# (2402.04396), Table 1: Llama-2-7B in 2 bits 8.22 without fine-tuning, where GPTQ's perplexity is over "
    "a hundred",
    control="GPTQ and round to nearest in two bits, groups of 64",
)
def two_bits_by_lattice(lab: Lab) -> Verdict:
    """Round SmolLM2 to two bits by grids, k-quants and E8P."""
    names = lab.pick(smoke=("RTN-2", "GPTQ-2", "QuIP#-2"), small=TWO)
    found, _, note = _scores(lab, names)
    found = _only(found, names)
    show(lab, "SmolLM2-135M-Instruct in two bits", found)
    return lab.judge(
        checks={
            "the perplexity is below GPTQ's, with fewer bits": found["QuIP#-2"].perplexity < found["GPTQ-2"].perplexity
            and found["QuIP#-2"].bits < found["GPTQ-2"].bits,
            "and below half of it": found["QuIP#-2"].perplexity < 0.5 * found["GPTQ-2"].perplexity,
            "GPTQ's below that of round to nearest": found["GPTQ-2"].perplexity < found["RTN-2"].perplexity,
        },
        measured={"perplexity, QuIP#-2": found["QuIP#-2"].perplexity, "bits": found["QuIP#-2"].bits},
        control={
            "perplexity, GPTQ-2": found["GPTQ-2"].perplexity,
            "bits, GPTQ-2": found["GPTQ-2"].bits,
            "perplexity, RTN-2": found["RTN-2"].perplexity,
        },
        note=note + " QuIP# went twice over its codes, where the paper does ten times.",
    )


@paper.claim(
    "In two bits learned codebooks hold as well; all formats in one plot",
    paper="AQLM (2401.06118), Table 1: Llama-2-7B at 2.02 bits 6.59, QuIP# 8.22; first Pareto-optimal below 3 bits",
    control="GPTQ in two bits, groups of 64",
)
def two_bits_by_codebook(lab: Lab) -> Verdict:
    """Round SmolLM2 to two bits by AQLM; show every format that was measured beside it."""
    found, _, note = _scores(lab, ("GPTQ-2", "AQLM-2"))
    front = show(lab, "SmolLM2-135M-Instruct in every format", found)
    draw(lab, "bits", "Perplexity of SmolLM2 in each format (dotted: as loaded)", found, GROUP)
    return lab.judge(
        checks={
            "the perplexity is below GPTQ's": found["AQLM-2"].perplexity < found["GPTQ-2"].perplexity,
            "and below half of it": found["AQLM-2"].perplexity < 0.5 * found["GPTQ-2"].perplexity,
        },
        measured={
            "perplexity, AQLM-2": found["AQLM-2"].perplexity,
            "bits": found["AQLM-2"].bits,
            "formats in the table": len(found) - 1,
            "Pareto front": ", ".join(front),
        },
        control={"perplexity, GPTQ-2": found["GPTQ-2"].perplexity, "bits, GPTQ-2": found["GPTQ-2"].bits},
        note=note
        + " AQLM searched its codes once, where the paper goes on until nothing is gained; in matrices of 576 "
        "columns its codebooks weigh as much as its codes.",
    )


@paper.claim(
    "A model that was never rounded before orders the formats alike",
    paper="not in the paper: the public file of SmolLM2 lies on 4-bit grids of 32 weights, which flatters some formats",
    control="round to nearest at the same bits",
)
def never_rounded_before(lab: Lab) -> Verdict:
    """Train a character model here in 32 bits and round it to each format in groups of 128, its width."""
    spec = character_llama(128, 4, 4, 384)
    model = trained(lab, spec, lab.pick(smoke=2, small=800, large=4000), lab.seed, "training in full precision")
    windows = play().train_windows(length=64, batch=lab.pick(smoke=2, small=64), count=4, seed=lab.seed + 1)
    calibration = [batch["tokens"] for batch in windows]
    tokens = play().validation[: lab.pick(smoke=256, small=16_384)]
    known = Subject(model, tokens, calibration, 65, "", lab.pick(smoke="blocks.0.mixer.query", small="all-linear"))
    formats = {name: form for line in lines(128).values() for name, form in line.items()}
    smoke = ("RTN-4", "GPTQ-4", "AWQ-4", "RTN-2", "GPTQ-2", "QuIP#-2")
    # one epoch is for matrices of millions: here the search may go on
    formats |= {"AQLM-2": replace(compress.AQLM(), bits=6), "QuIP#-2": compress.QuIPSharp(bits=2)}
    found = scored(lab, known, {name: formats[name] for name in lab.pick(smoke=smoke, small=tuple(formats))})
    front = show(lab, "A character model trained here, in every format", found)
    draw(lab, "never-rounded", "Perplexity a character of a model trained here (dotted: in 32 bits)", found, 128)
    kl = {name: score.divergence for name, score in found.items()}
    return lab.judge(
        checks={
            "four bits: GPTQ and AWQ nearer to the model than round to nearest": max(kl["GPTQ-4"], kl["AWQ-4"])
            < kl["RTN-4"],
            "two bits: QuIP# < GPTQ < round to nearest": kl["QuIP#-2"] < kl["GPTQ-2"] < kl["RTN-2"],
        },
        measured={f"KL, {name}": value for name, value in kl.items() if not name.startswith(("RTN", "as"))}
        | {"Pareto front": ", ".join(front)},
        control={f"KL, {name}": value for name, value in kl.items() if name.startswith("RTN")},
        note="tinyshakespeare, one character a token, 4 blocks of width 128; groups of 128 are whole rows. AQLM's "
        "codebooks have 64 vectors; in matrices so small they weigh more than the codes, and the bits say so.",
    )


@paper.claim(
    "Four bits that learned from data follow instructions on form as often as full precision; three rounded do not",
    paper="Table 4: IFEval drops more than other tasks; weight-only four bits stay near full precision",
    control="round to nearest in three bits",
)
def follows_forms(lab: Lab) -> Verdict:
    """Let SmolLM2 answer prompts whose form a rule can verify, greedily, in full precision and rounded."""
    known = subject(lab)
    asked = prompts(lab.pick(smoke=2, small=20, large=50))
    known.model.tokenizer = known.tokenizer
    texts = [api.chat_prompt(known.model, [{"role": "user", "content": prompt}]) for prompt, _ in asked]
    kinds = {"GPTQ-4": compress.GPTQ(bits=4, group=GROUP), "RTN-3": compress.Uniform(bits=3, group=GROUP)}
    followed: dict[str, float] = {}
    answers: dict[str, list[str]] = {}
    for name in lab.track(["as loaded", *kinds], "models that answer"):
        model = known.model if name == "as loaded" else compress.decompress(known.rounded(kinds[name]))
        answers[name] = pw.generate(model, texts, max_new_tokens=lab.pick(smoke=2, small=40), temperature=0.0)
        rules = [rule(answer.strip()) for answer, (_, rule) in zip(answers[name], asked, strict=True)]
        followed[name] = sum(rules) / len(rules)
    lab.text(asked[0][0], "\n".join(f"{name}: {found[0].strip()}" for name, found in answers.items()))
    lab.table(
        "Answers whose form is as asked",
        ["model", "share", "prompts"],
        [[name, f"{share:.0%}", len(asked)] for name, share in followed.items()],
    )
    return lab.judge(
        checks={
            "GPTQ-4 within a fifth of the prompts of full precision": abs(followed["GPTQ-4"] - followed["as loaded"])
            <= 0.2,
            "round to nearest in three bits below both": followed["RTN-3"]
            < min(followed["GPTQ-4"], followed["as loaded"]),
        },
        measured={"as loaded": followed["as loaded"], "GPTQ-4": followed["GPTQ-4"], "prompts": len(asked)},
        control={"RTN-3": followed["RTN-3"]},
        note=PROVENANCE
        + "Greedy answers of at most 40 tokens through the chat template. A model of 135 million weights "
        "follows few such instructions to begin with, and one prompt is a twentieth.",
    )


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
