"""MatMul-free LM: ternary layers and an elementwise recurrence leave no product of matrices in a language model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT, INK
from paperworks.models import Decoder, DecoderModel, count_parameters
from paperworks.models.presets.matmul_free import matmul_free
from paperworks.nn import BitLinear
from paperworks.nn.recurrent.mlgru import MLGRUModule, layer_bounds
from paperworks.nn.recurrent.recurrence import doubling_recurrence, linear_recurrence
from paperworks.nn.ternary import TernaryLinear, eight_bits, ternary
from paperworks.testbeds.characters import LR, held_out_loss, play, trained

paper = Paper(
    key="matmul-free-lm",
    title="Scalable MatMul-free Language Modeling",
    authors="Zhu, Zhang, Sifferman, Sheaves, Wang, Richmond, Zhou, Eshraghian",
    year=2024,
    ref="arXiv:2406.02528",
    family="recurrent",
    summary=(
        "All linear layers are ternary, so that they add and subtract, and tokens are mixed by a gated recurrence of "
        "elementwise products, whose gates do not see the state: a language model without a product of matrices."
    ),
    implements=(
        "paperworks.nn.recurrent.mlgru.MLGRU",
        "paperworks.nn.recurrent.mlgru.layer_bounds",
        "paperworks.models.presets.matmul_free.matmul_free",
    ),
)

PUBLISHED = {"370M": (1024, 24, 370e6), "1.3B": (2048, 24, 1.3e9), "2.7B": (2560, 32, 2.7e9)}  # width, layers, name


def accumulated(x: Tensor, signs: Tensor, *, subtract: bool = True) -> Tensor:
    """Return x signs^T of integers by going through the inputs once, adding or subtracting each where it belongs."""
    sums = torch.zeros(len(x), len(signs), dtype=torch.int64)
    for place in range(x.shape[1]):
        adds, takes = signs[:, place] > 0, signs[:, place] < 0
        sums[:, adds] += x[:, place : place + 1]
        if subtract:
            sums[:, takes] -= x[:, place : place + 1]
    return sums


def _layers(model: DecoderModel) -> list[TernaryLinear]:
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]


@paper.claim(
    "Every layer adds and subtracts only, every order of the scan is one function, and bounds rise from 0",
    paper="Section 3: dense layers without products of matrices, and the MLGRU; lower bounds as in HGRN",
    kind="exact",
    control="an accumulation that leaves out the subtractions",
)
@torch.no_grad()
def additions_only(lab: Lab) -> Verdict:
    """Accumulate integers for each layer of a model, head included; compare scans and look at bounds in float64."""
    draws = torch.Generator().manual_seed(lab.seed)
    torch.manual_seed(lab.seed)
    model = replace(matmul_free(64, 2, vocab_size=97, hidden=128), init_std=0.2).build()
    layers = _layers(model)
    same, wrong, compared = True, False, 0
    for layer in layers:
        x = torch.randn(8, layer.in_features, generator=draws)
        integers, step = eight_bits(F.rms_norm(x, (layer.in_features,), None, layer.spec.eps))
        signs, scale = ternary(layer.weight)
        whole = integers.long()
        sums = accumulated(whole, signs.long())
        same = (
            same and torch.equal(sums, whole @ signs.long().t()) and torch.equal(sums.float() * step * scale, layer(x))
        )
        wrong = wrong or torch.equal(accumulated(whole, signs.long(), subtract=False), sums)
        compared += sums.numel()
    decay = torch.rand(2, 100, 6, dtype=torch.float64, generator=draws)
    drive = torch.randn(2, 100, 6, dtype=torch.float64, generator=draws)
    start = torch.randn(2, 6, dtype=torch.float64, generator=draws)
    scans = linear_recurrence(decay, drive, start), doubling_recurrence(decay, drive, start)
    spread = float((scans[0] - scans[1]).abs().max())
    bounds = layer_bounds(3 * torch.randn(24, 64, dtype=torch.float64, generator=draws))
    counts = {name: count_parameters(matmul_free(dim, depth)) for name, (dim, depth, _) in PUBLISHED.items()}
    sized = all(abs(counts[name] / named - 1) < 0.05 for name, (_, _, named) in PUBLISHED.items())
    return lab.judge(
        checks={
            "sums of integers are the integer product and, times the scales, the layer, bit for bit": same,
            "in all layers, the head too": len(layers) == 2 * 7 + 1,
            "leaving out subtractions changes them": not wrong,
            "one after the other and by doubling, the scan agrees to 1e-12": spread < 1e-12,
            "bounds are 0 in the first layer": not bool(bounds[0].any()),
            "they rise from layer to layer": all(bool((a < b).all()) for a, b in itertools.pairwise(bounds)),
            "and stay below 1": float(bounds.max()) < 1,
            "parameters are within 5% of the names of the published models": sized,
        },
        measured={
            "sums compared": compared,
            "largest difference of scans": spread,
            "largest bound": float(bounds.max()),
            **{f"parameters, {name}": count for name, count in counts.items()},
        },
        control={"sums are equal without subtractions": wrong},
    )


@paper.claim(
    "It learns text, near its version in full precision, and not at all without the straight-through gradient",
    paper="Table 1: zero-shot average 40.3 at 370M and 49.9 at 2.7B, Transformer++ 41.1 and 50.7",
    control="no gradient through the rounding; and the same architecture with plain linear layers",
)
def learns(lab: Lab) -> Verdict:
    """Train on characters of tinyshakespeare: ternary, plain, and a short while with and without the gradient."""
    steps, short = lab.pick(smoke=(2, 2), small=(350, 60), large=(3000, 300))
    text = play()
    depth, dim = lab.pick(smoke=(2, 32), small=(6, 128))
    ours = matmul_free(dim, depth, vocab_size=text.tokenizer.vocab_size, hidden=lab.pick(smoke=64, small=352))
    blocked = BitLinear(straight_through=False)
    arms: dict[str, tuple[Decoder, int]] = {
        "ternary": (ours, steps),
        "full precision": (replace(ours, linear=None, head=None), steps),
        "ternary, short": (ours, short),
        "no gradient, short": (replace(ours, linear=blocked, head=blocked), short),
    }
    models = {name: trained(lab, spec, taken, lab.seed, name) for name, (spec, taken) in arms.items()}
    losses = {name: held_out_loss(lab, model) for name, model in models.items()}
    alone = _single_characters()
    zeros = [float((ternary(layer.weight)[0] == 0).double().mean()) for layer in _layers(models["ternary"])]
    mixers = [module for module in models["ternary"].modules() if isinstance(module, MLGRUModule)]
    with torch.no_grad():
        bounds = [float(torch.as_tensor(mixer.lower_bound()).mean()) for mixer in mixers]
    _draw(lab, losses, alone, (steps, short))
    return lab.judge(
        checks={
            "its loss is at most 2.0 nats": losses["ternary"] <= 2.0,
            "within 0.25 of full precision": losses["ternary"] <= losses["full precision"] + 0.25,
            "0.2 to 0.5 of each layer's weights are zeros": min(zeros) >= 0.2 and max(zeros) <= 0.5,
            f"without the gradient, {short} steps do not reach the entropy of single characters": (
                losses["no gradient, short"] > alone
            ),
            "with it, they pass it by 0.3 nats": losses["ternary, short"] < alone - 0.3,
        },
        measured={
            "loss, ternary": losses["ternary"],
            "loss, full precision": losses["full precision"],
            f"loss, ternary, {short} steps": losses["ternary, short"],
            "least and largest share of zeros": [min(zeros), max(zeros)],
            "lower bounds learned, mean of each layer": bounds,
        },
        control={
            f"loss without the gradient, {short} steps": losses["no gradient, short"],
            "entropy of single characters": alone,
        },
        note=f"{depth} layers, width {dim}, {steps} steps of 1,024 characters, peak rate {LR}, seed {lab.seed}; nats a "
        "character on the last tenth of the play. The version in full precision has plain layers, without their norms.",
    )


def _single_characters() -> float:
    """Return the held-out loss of knowing only how often each character comes."""
    text = play()
    counts = torch.bincount(text.training, minlength=text.tokenizer.vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[text.validation].mean())


def _draw(lab: Lab, losses: dict[str, float], alone: float, steps: tuple[int, int]) -> None:
    labels = {
        "ternary": f"ternary, {steps[0]} steps",
        "full precision": f"full precision, {steps[0]} steps",
        "ternary, short": f"ternary, {steps[1]} steps",
        "no gradient, short": f"no gradient, {steps[1]} steps",
    }
    with lab.figure("losses", figsize=(7.2, 2.8)) as figure:
        axes = figure.subplots()
        for row, name in enumerate(labels):
            color = {"full precision": COLORS[1], "no gradient, short": CONTROL}.get(name, COLORS[0])
            axes.barh(row, losses[name], color=color, height=0.6)
            axes.text(losses[name] + 0.05, row, f"{losses[name]:.3f}", va="center", color=INK)
        axes.axvline(alone, color=FAINT, linestyle=":", label="knowing single characters' frequencies")
        axes.set_yticks(range(len(labels)), list(labels.values()))
        axes.set_ylim(len(labels) - 0.5, -0.6)
        axes.set_xlim(0, 1.15 * max(losses.values()))
        axes.grid(axis="y", visible=False)
        axes.set(title="Without products of matrices", xlabel="nats a character on held-out text")
        figure.legend(loc="outside lower right")
