"""AWQ: the weights behind large inputs matter most, and a scale protects them at no cost in bits."""

from __future__ import annotations

import statistics as stats

import torch
from torch import Tensor, nn

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.awq import AWQ, channel_scales, fold_into_norm
from paperworks.compress.formats.uniform import Uniform
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="awq",
    title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    authors="Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han",
    year=2023,
    ref="arXiv:2306.00978",
    family="quantization",
    summary=(
        "Which weights matter is seen in the inputs, not in the weights: multiplied by a power of their input's mean "
        "magnitude before rounding, and divided by it after, they get a finer grid. No gradient, no fitting."
    ),
    implements=(
        "paperworks.compress.formats.awq.AWQ",
        "paperworks.compress.formats.awq.channel_scales",
        "paperworks.compress.formats.awq.fold_into_norm",
    ),
)

PLAIN = Uniform(bits=3, group=64)
SCALED = AWQ(bits=3, group=64, output_clip=False)
CLIPPED = AWQ(bits=3, group=64)


@paper.claim(
    "Scaled by their inputs, three-bit weights cost SmolLM2 less",
    paper="Table 4: Llama-2-7B at INT3-g128 on WikiText2 5.47; 6.66 rounded to nearest, 6.24 with AWQ",
    control="round to nearest on the same grids: three bits, groups of 64",
)
def costs_less_at_three_bits(lab: Lab) -> Verdict:
    """Score SmolLM2 with its block's linear layers rounded to nearest, scaled, and scaled and clipped."""
    known = subject(lab)
    forms = {"round to nearest": PLAIN, "scaled": SCALED, "scaled and clipped": CLIPPED}
    dense = known.perplexity()
    found = {name: known.perplexity(form) for name, form in lab.track(list(forms.items()), "formats")}
    rise = {name: value - dense for name, value in found.items()}
    lab.table(
        "Three bits a weight, groups of 64",
        ["weights", "bits a weight", "perplexity", "rise"],
        [
            ["as loaded", 5.0, dense, ""],
            *(
                [name, form.bits_per_weight((576, 576)), found[name], f"{rise[name] / dense:+.1%}"]
                for name, form in forms.items()
            ),
        ],
    )
    return lab.judge(
        checks={
            "at least 10% of the rise is gone": rise["scaled"] <= 0.9 * rise["round to nearest"],
            "clipping helps further": found["scaled and clipped"] < found["scaled"],
        },
        measured={
            "perplexity, as loaded": dense,
            "perplexity, scaled": found["scaled"],
            "perplexity, scaled and clipped": found["scaled and clipped"],
        },
        control={"perplexity, round to nearest": found["round to nearest"]},
        note=PROVENANCE + known.words + ". Each layer has scales of its own, searched for its own output; the paper "
        "shares them among the layers behind one norm and judges whole attention and MLP parts.",
    )


@paper.claim(
    "One input channel in a hundred, chosen by the inputs, holds much of the loss; chosen by the weights, little",
    paper="Table 1: keeping 1% of channels in FP16 helps when chosen by activations, not by weight norm",
    control="as many channels kept, chosen by the norm of their weights",
)
def inputs_tell_which_weights_matter(lab: Lab) -> Verdict:
    """Round a random layer behind unequal inputs to three bits, keep 1% of its channels, and measure outputs."""
    layer = _Layer.random(lab)
    rounded = layer.rounded(PLAIN)
    whole = layer.loss(rounded)
    kept = max(1, round(layer.weight.shape[1] / 100))

    def recovered(importance: Tensor) -> float:
        channels = importance.topk(kept).indices
        mixed = rounded.clone()
        mixed[:, channels] = layer.weight[:, channels]
        return 1 - layer.loss(mixed) / whole

    by_inputs, by_weights = recovered(layer.x.abs().mean(0)), recovered(layer.weight.norm(dim=0))
    _, alpha = SCALED.search(layer.weight, *layer.known())
    scaled = layer.loss(layer.rounded(SCALED))
    curve = [layer.loss(_scaled(layer, step / 20)) / whole for step in range(20)]
    with lab.figure("exponent", figsize=(7.2, 2.8)) as figure:
        axes = figure.subplots()
        axes.plot([step / 20 for step in range(20)], curve, "o-", color=COLORS[0], markersize=4)
        axes.axhline(1, color=COLORS[1], linewidth=1)
        axes.set_xlabel("exponent of the scales: 0 is round to nearest")
        axes.set_ylim(0)
        axes.set_title("Squared output error, relative to round to nearest")
    return lab.judge(
        checks={
            "chosen by inputs, at least twice the loss is gone": by_inputs >= 2 * max(by_weights, 0.0),
            "scales do it without keeping anything": scaled < 0.9 * whole,
            "with an exponent above 0": alpha > 0,
        },
        measured={
            "share of the loss gone, by inputs": by_inputs,
            "loss with scales": scaled / whole,
            "exponent": alpha,
        },
        control={"share of the loss gone, by weight norm": by_weights},
        note="Three channels in 256 are 30 times louder than the rest: outlier features as large models have them.",
    )


class _Layer:
    """A weight and inputs, of which a few channels are loud."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.weight, self.x = weight, x

    @classmethod
    def random(cls, lab: Lab) -> _Layer:
        draws = torch.Generator().manual_seed(lab.seed)
        weight = torch.randn(lab.pick(smoke=16, small=256), 256, generator=draws)
        x = torch.randn(lab.pick(smoke=64, small=2048), 256, generator=draws)
        x[:, torch.randperm(256, generator=draws)[:3]] *= 30
        return cls(weight, x)

    def known(self) -> tuple[Tensor, Tensor]:
        return self.x.T @ self.x / len(self.x), self.x.abs().mean(0)

    def rounded(self, form: Uniform) -> Tensor:
        shape = (self.weight.shape[0], self.weight.shape[1])
        return form.decode(form.encode(self.weight, Statistics.of(self.x, form.needs)), shape)

    def loss(self, weight: Tensor) -> float:
        return float(((weight - self.weight) @ self.x.T).square().mean())


def _scaled(layer: _Layer, alpha: float) -> Tensor:
    scales = channel_scales(layer.x.abs().mean(0), alpha)
    slices = PLAIN.slices(layer.weight * scales)
    return PLAIN.grid(slices).nearest(slices).view_as(layer.weight) / scales


@paper.claim(
    "Folding scales into the norm before changes no output, and exponent 0 is round to nearest",
    paper="Section 3.2: Q(W diag(s)) (diag(s)^-1 x), with diag(s)^-1 fused into the previous operator",
    kind="exact",
)
def folding_changes_nothing(lab: Lab) -> Verdict:
    """Fold random scales into both kinds of norm; and encode with inputs that are all alike."""
    draws = torch.Generator().manual_seed(lab.seed)
    apart = []
    for norm in (nn.RMSNorm(64), nn.LayerNorm(64)):
        linears = [nn.Linear(64, 16), nn.Linear(64, 48)]
        x, scales = torch.randn(8, 64, generator=draws), torch.rand(64, generator=draws) * 4 + 0.25
        before = [linear(norm(x)).detach() for linear in linears]
        fold_into_norm(norm, linears, scales)
        apart += [
            float((linear(norm(x)) - out).detach().abs().max()) for linear, out in zip(linears, before, strict=True)
        ]
    weight, neutral = torch.randn(16, 64, generator=draws), Statistics.neutral(64)
    same = torch.equal(
        SCALED.decode(SCALED.encode(weight, neutral), (16, 64)), PLAIN.decode(PLAIN.encode(weight), (16, 64))
    )
    return lab.judge(
        checks={
            "outputs agree to 1e-5": max(apart) < 1e-5,
            "exponent 0 gives scales of 1": torch.equal(
                channel_scales(torch.rand(9, generator=draws), 0.0), torch.ones(9)
            ),
            "and round to nearest": same,
        },
        measured={"largest difference": max(apart), "median difference": stats.median(apart)},
    )
