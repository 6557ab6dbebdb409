"""RMSNorm: normalize by the root mean square alone; nothing is lost by leaving the mean where it is."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import Decoder
from paperworks.nn import LayerNorm, Norm, RMSNorm
from paperworks.nn.identity_norm import NoNorm
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, play, trained

paper = Paper(
    key="rmsnorm",
    title="Root Mean Square Layer Normalization",
    authors="Zhang, Sennrich",
    year=2019,
    ref="arXiv:1910.07467",
    family="blocks",
    summary=(
        "LayerNorm without the subtraction of the mean: the invariance to scale is what helps training, so dividing by "
        "the root mean square, even one estimated from a sixteenth of the units, is as good and cheaper."
    ),
    implements=(
        "paperworks.nn.norm.RMSNorm",
        "paperworks.nn.norm.RootMeanSquareNorm",
        "paperworks.nn.identity_norm.NoNorm",
    ),
)

EXACT = 1e-12  # float64 sums of a few dozen numbers
PARTIAL = 0.0625  # the paper's p of pRMSNorm, Section 6


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@paper.claim(
    "RMSNorm is invariant to the scale of inputs and weights, not to their mean",
    paper="Section 4.1, Table 1; Section 4.2: the gradient of the weight matrix is inversely proportional to its scale",
    kind="exact",
    control="LayerNorm, which is invariant to a shift as well",
)
def invariances(lab: Lab) -> Verdict:
    """Compute each invariance in float64, with eps = 0."""
    dim, scale = 48, 37.0
    rms = RMSNorm(eps=0.0).build(dim).double()
    layer = LayerNorm(eps=0.0).build(dim).double()
    part = RMSNorm(eps=0.0, fraction=PARTIAL).build(dim).double()
    gain = torch.rand(dim, dtype=torch.float64) + 0.5
    with torch.no_grad():
        for module in (rms, layer, part):
            module.weight.copy_(gain)  # type: ignore[operator]
    x = torch.randn(16, dim, dtype=torch.float64)
    weight = torch.randn(dim, dim, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    tail = x.clone()
    tail[:, 3:] *= 5  # ceil(48 * 0.0625) = 3 units are looked at
    head = x[:, :3].norm(dim=-1, keepdim=True)
    measured = {
        "input times 37": _largest(rms(scale * x) - rms(x)),
        "weight matrix times 37": _largest(rms(x @ (scale * weight).T) - rms(x @ weight.T)),
        "input plus 1": _largest(rms(x + 1) - rms(x)),
        "from LayerNorm, mean 0": _largest(rms(centred) - layer(centred)),
        "from LayerNorm, any mean": _largest(rms(x) - layer(x)),
        "gradient of the weights, times their scale": _gradient_at_scale(rms, weight, x, scale),
        "cosine of input and its gradient": _cosine_with_gradient(rms, x),
        "pRMSNorm, input times 37": _largest(part(scale * x) - part(x)),
        "pRMSNorm, first 3 of 48 units only": _largest(part(tail) - tail / (head / 3**0.5) * gain),
    }
    return lab.judge(
        checks={
            "unchanged when the input is scaled": measured["input times 37"] < EXACT,
            "unchanged when the weight matrix is scaled": measured["weight matrix times 37"] < EXACT * scale,
            "changed when the input is shifted": measured["input plus 1"] > 0.1,
            "LayerNorm exactly where the mean is 0": measured["from LayerNorm, mean 0"] < EXACT,
            "and only there": measured["from LayerNorm, any mean"] > 0.1,
            "the weights' gradient is inversely proportional to their scale": (
                measured["gradient of the weights, times their scale"] < EXACT
            ),
            "the input's gradient is orthogonal to it": measured["cosine of input and its gradient"] < EXACT,
            "pRMSNorm is invariant to scale": measured["pRMSNorm, input times 37"] < EXACT * scale,
            "pRMSNorm looks at the first units only": measured["pRMSNorm, first 3 of 48 units only"] < EXACT * scale,
        },
        measured=measured,
        control={
            "LayerNorm, input times 37": _largest(layer(scale * x) - layer(x)),
            "LayerNorm, input plus 1": _largest(layer(x + 1) - layer(x)),
        },
        note="Largest differences; float64, eps = 0, random gains.",
    )


def _gradient_at_scale(norm: nn.Module, weight: Tensor, x: Tensor, scale: float) -> float:
    """Return by how much scale * gradient(scale * weight) differs from gradient(weight)."""
    towards = torch.randn_like(x)

    def gradient(factor: float) -> Tensor:
        scaled = (factor * weight).requires_grad_()
        return torch.autograd.grad((norm(x @ scaled.T) * towards).sum(), scaled)[0]

    one = gradient(1.0)
    return _largest(scale * gradient(scale) - one) / _largest(one)


def _cosine_with_gradient(norm: nn.Module, x: Tensor) -> float:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((norm(x) * torch.randn_like(x)).sum(), x)
    return _largest(torch.cosine_similarity(x, gradient, dim=-1))


@paper.claim(
    "Large half-precision inputs are normalized without overflow",
    paper="Equation 4; the paper says nothing of precision: the root is taken in float32 in every later implementation",
    control="the squares taken in the input's own precision",
)
def half_precision(lab: Lab) -> Verdict:
    """Normalize inputs of magnitude 300 in float16 and bfloat16, and compare with float64."""
    dim = 256
    wide = torch.randn(32, dim, dtype=torch.float64)
    wide = 300 * wide / wide.square().mean(-1, keepdim=True).sqrt()
    measured: dict[str, float] = {}
    control: dict[str, float] = {}
    finite = True
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        x = wide.to(dtype)
        norm = RMSNorm().build(dim).to(dtype)
        expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
        with torch.no_grad():
            found = norm(x)
        finite = finite and bool(found.isfinite().all())
        measured[f"{name}, relative error in units of its precision"] = (
            _largest((found.double() - expected) / expected) / torch.finfo(dtype).eps
        )
        narrow = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
        control[f"{name}, relative error in units of its precision"] = (
            _largest((narrow.double() - expected) / expected) / torch.finfo(dtype).eps
        )
        control[f"{name}, share of squares that overflow"] = float(x.square().isinf().double().mean())
    return lab.judge(
        checks={
            # Rounding the normalized value to the nearest costs half a unit; the float32 arithmetic next to nothing.
            "outputs are within one unit of the precision": finite and all(error <= 1.0 for error in measured.values()),
            "squares of float16 overflow": control["float16, share of squares that overflow"] > 0.1,
            "and their norm is wrong by all its digits": (
                control["float16, relative error in units of its precision"] > 500
            ),
        },
        measured=measured,
        control=control,
        note="Inputs whose root mean square is 300: a square of 90,000 is beyond float16's largest number, 65,504.",
    )


@paper.claim(
    "Both published cast orders are reproduced",
    paper="LLaMA multiplies by the gain after casting back, Gemma by (1 + gain) before; in bfloat16 they differ",
    kind="parity",
)
def cast_orders(lab: Lab) -> Verdict:
    """Compare with both orders written out, on bfloat16 inputs."""
    dim = 256
    x, gain = torch.randn(64, dim).bfloat16(), (torch.randn(dim) * 0.3).bfloat16()
    llama, gemma = RMSNorm().build(dim).bfloat16(), RMSNorm(offset=True).build(dim).bfloat16()
    with torch.no_grad():
        llama.weight.copy_(1 + gain)  # type: ignore[operator]
        gemma.weight.copy_(gain)  # type: ignore[operator]
        normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        after = normal.bfloat16() * llama.weight  # type: ignore[operator]
        before = (normal * (1 + gemma.weight.float())).bfloat16()  # type: ignore[operator]
        wrong = {
            "LLaMA": float((llama(x) != after).double().mean()),
            "Gemma": float((gemma(x) != before).double().mean()),
        }
        mixed = float((llama(x) != before).double().mean())
    return lab.judge(
        # A last bit may turn where torch's kernel adds the squares in another order.
        checks={
            "LLaMA's": wrong["LLaMA"] <= 0.001,
            "Gemma's": wrong["Gemma"] <= 0.001,
            "and they are not the same": mixed > 0.05,
        },
        measured={f"{name}, share of outputs that differ": value for name, value in wrong.items()},
        control={"share that differs when the orders are exchanged": mixed},
    )


def _with_norm(spec: Decoder, norm: Norm) -> Decoder:
    return replace(spec, norm=norm, block=replace(spec.blocks[0], norm=norm))


@paper.claim(
    "RMSNorm and pRMSNorm train a language model as well as LayerNorm",
    paper="Section 6.1, Table 2 (newstest2014): 22.4 BLEU with RMSNorm, 22.6 with pRMSNorm, 22.6 with LayerNorm, 21.7 "
    "without a norm",
    control="no normalization at all, the same learning rate",
)
def trains_as_well(lab: Lab) -> Verdict:
    """Train six-layer character models that differ only in the norm."""
    steps, seeds = lab.pick(smoke=2, small=300, large=2000), lab.pick(smoke=(lab.seed,), small=(lab.seed, lab.seed + 1))
    play()  # before the bars: it may have to be fetched
    base = character_llama(depth=lab.pick(smoke=1, small=6))
    norms: dict[str, Norm] = {
        "LayerNorm": LayerNorm(),
        "RMSNorm": RMSNorm(),
        "pRMSNorm, 6.25%": RMSNorm(fraction=PARTIAL),
        "pRMSNorm, 25%": RMSNorm(fraction=0.25),  # as many units of 64 as the paper's 6.25% takes of 256
        "no norm": NoNorm(),
    }
    losses: dict[str, list[float] | None] = {}
    for name, norm in norms.items():
        losses[name] = _losses(lab, _with_norm(base, norm), steps, seeds, name)
    normed = {name: value for name, value in losses.items() if value is not None and name != "no norm"}
    means = {name: statistics.fmean(value) for name, value in normed.items()}
    without = losses["no norm"]
    # A norm that diverged is as far as can be.
    apart = abs(means["RMSNorm"] - means["LayerNorm"]) if {"RMSNorm", "LayerNorm"} <= set(means) else math.inf
    paper_three = [means[name] for name in ("LayerNorm", "RMSNorm", "pRMSNorm, 6.25%") if name in means]
    behind = None if without is None else statistics.fmean(without) - max(means.values())
    _draw_losses(lab, losses)
    return lab.judge(
        checks={
            "LayerNorm, RMSNorm and pRMSNorm (6.25%) are within 0.03 nats of each other": (
                len(paper_three) == 3 and max(paper_three) - min(paper_three) <= 0.03
            ),
            "RMSNorm alone is within 0.03 nats of LayerNorm": apart <= 0.03,
            # Twice the width of the band in which the norms count as equal.
            "without a norm it diverges or is worse by 0.06 nats": behind is None or behind >= 0.06,
        },
        measured={
            **{f"loss, {name}": value for name, value in means.items()},
            "largest difference of the three": max(paper_three) - min(paper_three),
            **{f"loss by seed, {name}": value for name, value in normed.items()},
        },
        control={
            "loss, no norm": "diverged" if without is None else statistics.fmean(without),
            "worse than the worst norm by": "diverged" if behind is None else behind,
        },
        note=f"6 layers, width 64, {steps} steps of 1,024 characters of tinyshakespeare, peak rate {LR}, "
        f"seeds {', '.join(map(str, seeds))}; nats a character on the last tenth. "
        "At this width 6.25% are 4 of 64 units, a noisy estimate (in the paper 32 or more); 25% are 16.",
    )


def _losses(lab: Lab, spec: Decoder, steps: int, seeds: tuple[int, ...], name: str) -> list[float] | None:
    try:
        return [held_out_loss(lab, trained(lab, spec, steps, seed, f"{name}, seed {seed}")) for seed in seeds]
    except train.Diverged:
        return None


def _draw_losses(lab: Lab, losses: dict[str, list[float] | None]) -> None:
    with lab.figure("losses", figsize=(7.6, 2.6)) as figure:
        axes = figure.subplots()
        for row, (name, values) in enumerate(losses.items()):
            color = CONTROL if name == "no norm" else COLORS[0]
            if values is None:
                axes.text(0.5, row, "diverged", color=INK, va="center", transform=axes.get_yaxis_transform())
                continue
            mean = statistics.fmean(values)
            axes.plot(values, [row] * len(values), "o", color=color, markersize=8, alpha=0.75)
            axes.text(max(values), row - 0.28, f"{mean:.3f}", color=INK, ha="right", va="center")
        axes.set_yticks(range(len(losses)), list(losses))
        axes.set_ylim(len(losses) - 0.5, -0.6)
        axes.margins(x=0.08)
        axes.set_xlabel("nats a character on held out text, one dot a seed")
        axes.set_title("A character model with each norm")


def _plain_layer_norm(x: Tensor, gain: Tensor) -> Float[Tensor, "rows dim"]:
    """LayerNorm without its bias, so that only the re-centring is timed."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * gain


def _plain_rms_norm(x: Tensor, gain: Tensor) -> Float[Tensor, "rows dim"]:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


@paper.claim(
    "Written with the same tensor operations, RMSNorm takes less time than LayerNorm",
    paper="Tables 2 to 9: 7% to 64% less running time than LayerNorm, whole models on their authors' frameworks",
    control="LayerNorm, written with the same operations and without its bias",
)
def takes_less_time(lab: Lab) -> Verdict:
    """Time both in turn on one thread, forward and backward, and torch's own kernels beside them."""
    rows, dim = lab.pick(smoke=64, small=1024), 512
    x = torch.randn(rows, dim, requires_grad=True)
    gain = torch.ones(dim, requires_grad=True)
    kernel = nn.LayerNorm(dim)
    parts: dict[str, Callable[[], Tensor]] = {
        "LayerNorm": lambda: _plain_layer_norm(x, gain),
        "RMSNorm": lambda: _plain_rms_norm(x, gain),
        "torch's LayerNorm kernel": lambda: kernel(x),
        "torch's rms_norm": lambda: nn.functional.rms_norm(x, (dim,), gain, 1e-6),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with lab.threads(1):
        for _ in lab.track(lab.pick(smoke=3, small=200), "rounds"):
            # In turn and shuffled: a busy moment, and what the part before left in the caches, hit all of them alike.
            for name in random.sample(list(parts), len(parts)):
                started = time.perf_counter()
                parts[name]().sum().backward()
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    saved = 1 - median["RMSNorm"] / median["LayerNorm"]
    return lab.judge(
        checks={"at least 7% less": saved >= 0.07},
        measured={
            "time saved": saved,
            "milliseconds, RMSNorm": 1000 * median["RMSNorm"],
            "milliseconds, torch's rms_norm": 1000 * median["torch's rms_norm"],
        },
        control={
            "milliseconds, LayerNorm": 1000 * median["LayerNorm"],
            "milliseconds, torch's LayerNorm kernel": 1000 * median["torch's LayerNorm kernel"],
        },
        note=f"Medians of rounds, {rows} rows of {dim}, forward and backward, one thread. A fused kernel can be faster "
        "than either, whichever norm it computes.",
    )
