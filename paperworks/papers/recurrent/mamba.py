"""Mamba: a state space whose steps depend on the token remembers what it chooses to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel, count_parameters, preset
from paperworks.nn import RWKV, Attention, Mamba, Mixer, Placement, RoPE
from paperworks.nn.recurrent.mamba import selective_scan
from paperworks.nn.recurrent.recurrence import doubling_recurrence, linear_recurrence
from paperworks.testbeds.recall import InductionHeads, SelectiveCopying
from paperworks.testbeds.recall_models import remembered, small, taught

paper = Paper(
    key="mamba",
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    authors="Gu, Dao",
    year=2023,
    ref="arXiv:2312.00752",
    family="recurrent",
    summary=(
        "A state-space layer whose step sizes, inputs and outputs depend on the token can keep some tokens and let "
        "others pass, which a time-invariant one cannot; cost grows linearly with length and a fixed state decodes."
    ),
    implements=("paperworks.nn.recurrent.mamba.Mamba", "paperworks.nn.recurrent.mamba.selective_scan"),
    equation=(
        r"h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t, \; y_t = C_t h_t, \quad \Delta_t, B_t, C_t \text{ "
        r"functions of } x_t"
    ),
    usage="""
import torch
from paperworks.models import Block, Decoder, count_parameters, preset
from paperworks.nn import Mamba, RMSNorm

print("mamba-130m:", count_parameters(preset("mamba-130m")), "parameters")
model = Decoder(vocab_size=100, dim=64, depth=2, block=Block(norm=RMSNorm(), mixer=Mamba()), norm=RMSNorm()).build()
print(tuple(model(torch.randint(100, (1, 50))).shape))
for length in (10, 10_000):
    print("bytes held after", length, "tokens:", model.new_cache(1, length).bytes())
""",
)

Metrics = dict[str, float | list[float]]

PUBLISHED = {  # parameters, tied embeddings of 50,280 tokens
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}


@paper.claim(
    "The architecture has the published sizes, and every order of the scan is one function",
    paper="Section 3.4 and Table 12 (sizes); Section 3.3.2: the scan may be evaluated in any association",
    kind="exact",
    control="a scan that forgets one factor",
)
@torch.no_grad()
def sizes_and_scans(lab: Lab) -> Verdict:
    """Count on the meta device; compare the scan in pieces, step by step and by doubling, in float64."""
    counts = {name: count_parameters(preset(name)) for name in PUBLISHED}
    draws = lab.generator(lab.seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    x, delta = drawn(2, 100, 6), drawn(2, 100, 6).abs()
    decay, into, out = -drawn(6, 4).abs(), drawn(2, 100, 4), drawn(2, 100, 4)
    factors, drive = torch.exp(delta[..., None] * decay), (delta * x)[..., None] * into[:, :, None]
    start = drawn(2, 6, 4)

    def read(states: Tensor) -> Tensor:
        return torch.einsum("btcn,btn->btc", states, out)

    pieces = selective_scan(x, delta, decay, into, out, start)[0]
    stepwise, doubled = read(linear_recurrence(factors, drive, start)), read(doubling_recurrence(factors, drive, start))
    wrong = factors.clone()
    wrong[:, 50] = 1.0
    forgetful = read(linear_recurrence(wrong, drive, start))
    spread = max(float((pieces - other).abs().max()) for other in (stepwise, doubled))
    return lab.judge(
        checks={
            "all five sizes are the published ones": counts == PUBLISHED,
            "pieces, steps and doubling agree to 1e-12": spread < 1e-12,
            "the wrong scan differs": float((pieces - forgetful).abs().max()) > 1e-3,
        },
        measured={"parameters": list(counts.values()), "largest difference of scans": spread},
        control={"largest difference": float((pieces - forgetful).abs().max())},
    )


@paper.claim(
    "Selection solves selective copying, which the same layer without it does not",
    paper="Table 1: selective copying 99.8% with selection, 18.3% for S4 and 57.0% for a gated S4",
    control="Delta, B and C learned but the same for every token; gate and convolution kept",
)
def selection_copies(lab: Lab) -> Verdict:
    """Three tokens of eight, scattered over 16 places, are to be said in order; two layers of width 64."""
    task = SelectiveCopying(count=3, spread=16)
    steps, every, rows = lab.pick(smoke=(4, 2, 8), small=(450, 50, 256))

    def arm(mixer: Mamba) -> Callable[[int], Metrics]:
        def measures(seed: int) -> Metrics:
            curve: list[float] = []

            def look(step: int, model: DecoderModel) -> None:
                curve.append(remembered(model, task, rows, seed=10**6 + seed))

            model = taught(lab, small(task, mixer), task, steps, seed, every=every, look=look)
            return {"tokens said right": remembered(model, task, 4 * rows, seed=10**7 + seed), "right": curve}

        return measures

    verdict = lab.compare(
        arms={"selective": arm(Mamba()), "time-invariant": arm(Mamba(selective=False))},
        main=Beats("selective", "time-invariant", on="tokens said right", by=0.1),
        also=[AtLeast("selective", 0.98, on="tokens said right")],
        seeds=2,
        note=f"{steps} steps of 32 rows. Gate and convolution alone recover much of this small task, as in the paper's "
        "gated ablation.",
    )
    lab.curves("right", name="copying", title=f"Selective copying: right, every {every} steps")
    return verdict


@paper.claim(
    "Induction heads trained at 32 tokens answer at sixteen times that length",
    paper="Table 2: trained at 256 tokens, perfect up to a million; time-invariant layers (H3, Hyena) fail",
    control="the same layers with Delta, B and C the same for every token",
)
def induction_extrapolates(lab: Lab) -> Verdict:
    """One special token was followed by an answer; at its second appearance the answer is to be said."""
    lengths = lab.pick(smoke=(32, 64), small=(32, 64, 128, 256, 512))
    task = InductionHeads(length=lengths[0])
    steps, rows = lab.pick(smoke=(4, 8), small=(550, 256))

    def arm(mixer: Mamba) -> Callable[[int], Metrics]:
        def measures(seed: int) -> Metrics:
            model = taught(lab, small(task, mixer), task, steps, seed, rows=16)
            right = [
                remembered(model, replace(task, length=at), max(32, rows * 32 // at), seed=10**6 + seed)
                for at in lengths
            ]
            return {
                "right at the trained length": right[0],
                "right at the longest": right[-1],
                "answers right": right,
                "tokens of the test": [float(at) for at in lengths],
            }

        return measures

    verdict = lab.compare(
        arms={"selective": arm(Mamba()), "time-invariant": arm(Mamba(selective=False))},
        main=Beats("selective", "time-invariant", on="right at the longest", by=0.45),
        also=[
            AtLeast("selective", 0.95, on="right at the longest"),
            AtLeast("selective", 0.95, on="right at the trained length"),
        ],
        seeds=2,
        note=f"{steps} steps of 16 rows; the longest test has {lengths[-1]} tokens. A guess is right once in 16.",
    )
    lab.curves("answers right", x="tokens of the test", name="induction", title="Trained on 32 tokens", log="x")
    return verdict


@paper.claim(
    "Cost grows linearly with length, where attention's grows quadratically, and decoding keeps a state of one size",
    paper="Section 4.5, Figure 8: the scan passes fused attention at 2,000 tokens on a GPU; no cache grows",
    control="attention with rotary positions at the same width",
)
@torch.no_grad()
def cost_is_linear(lab: Lab) -> Verdict:
    """Time one layer of width 256, forward, on one thread, the smallest of three; and count what decoding holds."""
    lengths = lab.pick(smoke=(32, 64), small=(512, 1024, 2048, 4096, 8192))

    def arm(mixer: Mixer) -> Callable[[int], Metrics]:
        def measures(seed: int) -> Metrics:
            module: Any = mixer.build(256)
            with lab.threads(1):
                seconds = [_seconds(module, torch.randn(1, at, 256)) for at in lengths]
            held = [module.new_cache(1, at, torch.float32, torch.device("cpu")).bytes() for at in lengths]
            return {
                "time at the longest / at a quarter": seconds[-1] / seconds[-3 if len(seconds) > 2 else 0],
                "bytes held at the longest / at the shortest": held[-1] / held[0],
                "microseconds a token": [1e6 * value / at for value, at in zip(seconds, lengths, strict=True)],
                "tokens": [float(at) for at in lengths],
            }

        return measures

    verdict = lab.compare(
        arms={"Mamba": arm(Mamba()), "attention": arm(Attention(heads=4, position=RoPE())), "RWKV": arm(RWKV())},
        main=Beats("Mamba", "attention", on="time at the longest / at a quarter", by=2, lower=True),
        also=[
            AtMost("Mamba", 5, on="time at the longest / at a quarter"),
            AtMost("Mamba", 1, on="bytes held at the longest / at the shortest"),
        ],
        seeds=3,
        note="Four times the length should cost four times the time. Ratios of one machine's timings; where the lines "
        "cross depends on it.",
    )
    lab.curves("microseconds a token", x="tokens", name="cost", title="One layer of width 256, forward", log="xy")
    return verdict


def _seconds(module: Callable[..., Tensor], x: Tensor) -> float:
    placement = Placement().resolve(1, x.shape[1], x.device)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        module(x, placement)
        taken.append(time.perf_counter() - began)
    return min(taken)
