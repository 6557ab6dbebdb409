"""Mamba: a state space whose steps depend on the token remembers what it chooses to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
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
)

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
    draws = torch.Generator().manual_seed(lab.seed)

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
    """Four tokens of eight, scattered over 24 places, are to be said in order; two layers of width 64."""
    task = SelectiveCopying()
    steps, every, rows = lab.pick(smoke=(4, 2, 8), small=(800, 50, 256))
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, mixer in (("selective", Mamba()), ("time-invariant", Mamba(selective=False))):
        curve = curves.setdefault(name, [])

        def look(step: int, model: DecoderModel, curve: list[tuple[int, float]] = curve) -> None:
            curve.append((step, remembered(model, task, rows)))

        model = taught(lab, small(task, mixer), task, steps, f"{name} copying", every=every, look=look)
        curve.append((steps + 1, remembered(model, task, 4 * rows)))
    with lab.figure("copying") as figure:
        axes = figure.subplots()
        for (name, curve), color in zip(curves.items(), (COLORS[0], CONTROL), strict=True):
            axes.plot(*zip(*curve[:-1], strict=True), color=color, label=name)
        axes.axhline(1 / task.alphabet, color=FAINT, linestyle=":", label="a guess")
        axes.set(title="Selective copying", xlabel="steps", ylabel="tokens said right", ylim=(0, 1.03))
        axes.legend(loc="center right")
    ours, control = (curves[name][-1][1] for name in ("selective", "time-invariant"))
    return lab.judge(
        checks={
            "at least 0.98 of the tokens are right": ours >= 0.98,
            "without selection at least 0.1 fewer": control <= ours - 0.1,
        },
        measured={"right, selective": ours, "steps": steps},
        control={"right, time-invariant": control},
        note="Gate and convolution alone recover much of this small task, as in the paper's gated ablation.",
    )


@paper.claim(
    "Induction heads trained at 64 tokens answer at sixteen times that length",
    paper="Table 2: trained at 256 tokens, perfect up to a million; time-invariant layers (H3, Hyena) fail",
    control="the same layers with Delta, B and C the same for every token",
)
def induction_extrapolates(lab: Lab) -> Verdict:
    """One special token was followed by an answer; at its second appearance the answer is to be said."""
    task = InductionHeads()
    steps, rows = lab.pick(smoke=(4, 8), small=(800, 256))
    lengths = lab.pick(smoke=(64, 128), small=(64, 128, 256, 512, 1024))
    accuracy: dict[str, list[float]] = {}
    for name, mixer in (("selective", Mamba()), ("time-invariant", Mamba(selective=False))):
        model = taught(lab, small(task, mixer), task, steps, f"{name} induction", rows=16)
        accuracy[name] = [
            remembered(model, replace(task, length=length), max(8, rows * 64 // length)) for length in lengths
        ]
    with lab.figure("induction") as figure:
        axes = figure.subplots()
        for (name, values), color in zip(accuracy.items(), (COLORS[0], CONTROL), strict=True):
            axes.plot(lengths, values, marker="o", color=color, label=name)
        axes.axhline(1 / task.alphabet, color=FAINT, linestyle=":", label="a guess")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(title="Trained on 64 tokens", xlabel="tokens of the test", ylabel="answers right", ylim=(0, 1.03))
        axes.legend(loc="center right")
    ours, control = accuracy["selective"], accuracy["time-invariant"]
    return lab.judge(
        checks={
            f"at {lengths[-1]} tokens at least 0.95 are right": ours[-1] >= 0.95,
            "at the trained length too": ours[0] >= 0.95,
            f"without selection less than 0.5 at {lengths[-1]}": control[-1] < 0.5,
        },
        measured={"right by length": ours, "lengths": list(lengths), "steps": steps},
        control={"right by length, time-invariant": control},
        note=(
            "A first design had attention with rotary positions as the control; in 1,200 steps of 32 rows it had not "
            "learned the task at its own length, so that it could tell nothing of longer ones. Mamba had, and said all "
            "answers at every length up to 1,024."
        ),
    )


@paper.claim(
    "Cost grows linearly with length, where attention's grows quadratically, and decoding keeps a state of one size",
    paper="Section 4.5, Figure 8: the scan passes fused attention at 2,000 tokens on a GPU; no cache grows",
    control="attention with rotary positions at the same width",
)
@torch.no_grad()
def cost_is_linear(lab: Lab) -> Verdict:
    """Time one layer of width 256, forward, on one thread, the smallest of three; and count what decoding holds."""
    lengths = lab.pick(smoke=(32, 64), small=(128, 256, 512, 1024, 2048, 4096, 8192))
    mixers: dict[str, Mixer] = {
        "attention": Attention(heads=4, position=RoPE()),
        "Mamba": Mamba(),
        "RWKV": RWKV(),
    }
    seconds = {name: [_seconds(mixer, length) for length in lengths] for name, mixer in mixers.items()}
    held = {
        name: [
            mixer.build(256).new_cache(1, length, torch.float32, torch.device("cpu")).bytes()  # type: ignore[operator]
            for length in (lengths[0], lengths[-1])
        ]
        for name, mixer in mixers.items()
    }
    growth = {name: values[-1] / values[-3 if len(values) > 2 else 0] for name, values in seconds.items()}
    crossing = {
        name: next((n for n, a, b in zip(lengths, seconds["attention"], values, strict=True) if b < a), "none measured")
        for name, values in seconds.items()
        if name != "attention"
    }
    with lab.figure("cost") as figure:
        axes = figure.subplots()
        for (name, values), color in zip(seconds.items(), (CONTROL, COLORS[0], COLORS[1]), strict=True):
            per_token = [1e6 * value / n for value, n in zip(values, lengths, strict=True)]
            axes.plot(lengths, per_token, marker="o", color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title="One layer of width 256, forward, one thread", xlabel="tokens", ylabel="microseconds a token")
        axes.legend(loc="center left")
    factor = lengths[-1] / lengths[-3 if len(lengths) > 2 else 0]
    return lab.judge(
        checks={
            "four times the length costs Mamba at most five times the time": growth["Mamba"] <= 1.25 * factor,
            "and attention at least eight times": growth["attention"] >= 2 * factor,
            "Mamba's state is as large at any length": held["Mamba"][0] == held["Mamba"][1],
            "attention's cache grows with it": held["attention"][1] > held["attention"][0],
        },
        measured={
            "seconds by length, Mamba": seconds["Mamba"],
            "seconds by length, RWKV": seconds["RWKV"],
            "lengths": list(lengths),
            "length from which Mamba is faster than attention": crossing["Mamba"],
            "length from which RWKV is faster than attention": crossing["RWKV"],
            "bytes held, shortest and longest": held["Mamba"],
        },
        control={"seconds by length": seconds["attention"], "bytes held": held["attention"]},
        note="Ratios of one machine's timings; where the lines cross depends on it.",
    )


def _seconds(mixer: Mixer, length: int) -> float:
    torch.manual_seed(0)
    module, x = mixer.build(256), torch.randn(1, length, 256)

    def once() -> float:
        began = time.perf_counter()
        module(x, Placement().resolve(1, length, x.device))
        return time.perf_counter() - began

    return _least(once)


def _least(measure: Callable[[], float], times: int = 3) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(measure() for _ in range(times))
    finally:
        torch.set_num_threads(before)
