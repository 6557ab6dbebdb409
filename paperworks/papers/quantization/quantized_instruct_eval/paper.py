"""Every weight format on one instruction-tuned model: how far it moves the model's predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import paperworks as pw
from paperworks import api, compress
from paperworks.compress import WeightFormat
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._rounded_model import bench
from paperworks.papers.quantization.quantized_instruct_eval.format_prompts import prompts
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
        "nothing, four bits little if the data have a say, and at three rounding to nearest breaks down."
    ),
    implements=("paperworks.compress.account.report",),
    equation=r"\mathrm{KL} = \tfrac{1}{T} \sum_t \sum_v p_t(v) \log \frac{p_t(v)}{\hat p_t(v)}",
    usage="""
import torch
from paperworks import compress

texts = [torch.randn(64, 256) for _ in range(4)]
for format in (compress.LLMInt8(), compress.AWQ(bits=4, group=64), compress.Uniform(bits=3, group=64)):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    wanted = model(texts[0]).log_softmax(-1).detach()
    found = compress.apply(model, format, calibration=texts)(texts[0]).log_softmax(-1).detach()
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    print(type(format).__name__, compress.report(model).bits_per_weight, "bits, KL", float(kl))
""",
    notes="Two bits are judged in the papers on QuIP# and AQLM. Of the paper's thirteen tasks, instructions on form "
    "are kept; a model of 135 million weights is near guessing in most others.",
)

# The width of 576 is no multiple of 128, and the weights at hand lie on grids of groups of 32: groups of 64.
GROUP = 64
BLOCKS = (0, 14)  # AWQ's search takes half a second a layer
KL, FLIPS, FOLLOWED = "KL, nats", "changed predictions", "forms as asked"


@paper.claim(
    "Formats order by bits, and at equal bits by how much they learn from data",
    paper="Tables 2 to 5: AWQ best of the weight-only methods, then GPTQ; FP8 and 8 bits close to full precision; "
    "Section 4: drops grow below four bits",
    control="round to nearest at the same bits, which learns nothing from data",
    reach="real",
)
def one_table_for_all(lab: Lab) -> Verdict:
    """Round two blocks of SmolLM2-135M-Instruct to each format and compare its predictions with its own before."""
    bed = bench(lab, blocks=BLOCKS, scored=2, calibrated=4)
    formats: dict[str, WeightFormat] = {
        "int8": compress.LLMInt8(),
        "FP8": compress.FP8(),
        "AWQ-4": compress.AWQ(bits=4, group=GROUP),
        "GPTQ-4": compress.GPTQ(bits=4, group=GROUP, act_order=True, static_groups=True),
        "RTN-4": compress.Uniform(bits=4, group=GROUP),
        "GPTQ-3": compress.GPTQ(bits=3, group=GROUP, act_order=True, static_groups=True),
        "RTN-3": compress.Uniform(bits=3, group=GROUP),
    }

    def arm(format: WeightFormat) -> Callable[[int], dict[str, float]]:
        own_arithmetic = type(format).multiply is not WeightFormat.multiply

        @torch.no_grad()
        def moved(seed: int) -> dict[str, float]:
            model, texts = bed.rounded(format, seed, decoded=not own_arithmetic), bed.texts(seed)
            wanted, found = (each(texts).log_softmax(-1) for each in (bed.model, model))
            return {
                KL: float((wanted.exp() * (wanted - found)).sum(-1).mean()),
                FLIPS: float((wanted.argmax(-1) != found.argmax(-1)).float().mean()),
                "bits a weight": format.bits_per_weight((576, 576)),
            }

        return moved

    verdict = lab.compare(
        arms={name: arm(format) for name, format in formats.items()},
        main=Beats("AWQ-4", "RTN-4", on=KL, by_ratio=0.15, lower=True),
        also=[
            Beats("GPTQ-4", "RTN-4", on=KL, by_ratio=0.15, lower=True),
            Beats("AWQ-4", "GPTQ-4", on=KL, lower=True),
            Beats("int8", "AWQ-4", on=KL, lower=True),
            Beats("FP8", "AWQ-4", on=KL, lower=True),
            Beats("GPTQ-3", "RTN-3", on=KL, by_ratio=0.15, lower=True),
            Beats("GPTQ-4", "RTN-3", on=KL, by_ratio=0.8, lower=True),  # the catalogue's five times
        ],
        seeds=3,
        note=PROVENANCE + bed.words + f". Blocks 0 and 14 of 30 are rounded, in groups of {GROUP}.",
    )
    lab.points(KL, name="divergence", log=True, title="How far each format moves SmolLM2's predictions: KL, nats")
    return verdict


@paper.claim(
    "Four bits that learned from data follow instructions on form as often as full precision; three rounded do not",
    paper="Table 4: IFEval drops more than other tasks; weight-only four bits stay near full precision",
    control="round to nearest in three bits",
    reach="real",
)
def follows_forms(lab: Lab) -> Verdict:
    """Let SmolLM2 answer prompts whose form a rule can verify, greedily, in full precision and rounded."""
    bed = bench(lab, blocks=range(0, 30, 2), calibrated=4)
    known, count = prompts(50), lab.pick(smoke=2, small=10, large=50)

    def arm(format: WeightFormat | None) -> Callable[[int], dict[str, float]]:
        def followed(seed: int) -> dict[str, float]:
            model = copy.copy(bed.model) if format is None else bed.rounded(format, seed)
            model.tokenizer = bed.tokenizer
            drawn = [known[index] for index in torch.randperm(len(known), generator=lab.generator(seed))[:count]]
            texts = [api.chat_prompt(model, [{"role": "user", "content": prompt}]) for prompt, _ in drawn]
            answers = pw.generate(model, texts, max_new_tokens=lab.pick(smoke=2, small=30), temperature=0.0)
            kept = [rule(answer.strip()) for answer, (_, rule) in zip(answers, drawn, strict=True)]
            return {FOLLOWED: sum(kept) / len(kept)}

        return followed

    ours, plain, rough = "GPTQ-4", "as loaded", "RTN-3"
    return lab.compare(
        arms={
            ours: arm(compress.GPTQ(bits=4, group=GROUP, act_order=True, static_groups=True)),
            plain: arm(None),
            rough: arm(compress.Uniform(bits=3, group=GROUP)),
        },
        main=Beats(ours, rough, on=FOLLOWED, by=0.1),
        also=[Within(ours, plain, on=FOLLOWED, by=0.2)],
        seeds=2,
        note=PROVENANCE
        + f"Greedy answers of at most 30 tokens through the chat template to {count} of 50 prompts drawn "
        "by the seed; every second block is rounded. A model so small follows few such instructions as it is.",
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
            # Eight sums of 32 float32 products; a kernel may add them up in another order.
            "KL 0, to 1e-6": abs(divergence) < 1e-6,
            "no changed prediction": bool((before.argmax(-1) == after.argmax(-1)).all()),
            # zero points take four bits here, not sixteen
            "4 + (16 + 4)/128 bits": bits == 4 + 20 / 128,
        },
        measured={"KL": divergence, "bits": bits},
    )
