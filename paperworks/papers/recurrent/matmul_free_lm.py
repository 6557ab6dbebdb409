"""MatMul-free LM: ternary layers and an elementwise recurrence leave no product of matrices in a language model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models import Decoder, DecoderModel, count_parameters
from paperworks.models.presets.matmul_free import matmul_free
from paperworks.nn import BitLinear
from paperworks.nn.recurrent.mlgru import layer_bounds
from paperworks.nn.recurrent.recurrence import doubling_recurrence, linear_recurrence
from paperworks.nn.ternary import TernaryLinear, eight_bits, ternary
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, play, trained

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
    equation=(
        r"h_t = f_t \odot h_{t-1} + (1 - f_t) \odot c_t, \quad f_t, c_t, g_t \text{ ternary maps of } x_t, \; o_t = "
        r"W_o (g_t \odot h_t)"
    ),
    usage="""
import torch
from paperworks.models import count_parameters
from paperworks.models.presets.matmul_free import matmul_free

spec = matmul_free(64, 2, vocab_size=100, hidden=172)
model = spec.build()
model(torch.randint(100, (1, 50))).logsumexp(-1).mean().backward()  # gradients go straight through the rounding
print(count_parameters(spec), "parameters;", model.new_cache(1, 10).bytes(), "bytes of state at any length")
""",
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
    "It learns text, near its version in full precision, and not without the straight-through gradient",
    paper="Table 1: zero-shot average 40.3 at 370M and 49.9 at 2.7B, Transformer++ 41.1 and 50.7",
    control="no gradient through the rounding; the same architecture with plain linear layers; a transformer",
    reach="real",
)
def learns(lab: Lab) -> Verdict:
    """Train each on characters of tinyshakespeare, equal steps."""
    text, steps = play(), lab.pick(smoke=2, small=220, large=3000)
    depth, dim = lab.pick(smoke=(2, 32), small=(3, 96))
    hidden = lab.pick(smoke=64, small=264)
    ours = matmul_free(dim, depth, vocab_size=text.tokenizer.vocab_size, hidden=hidden)
    blocked = BitLinear(straight_through=False)

    def arm(spec: Decoder) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = trained(lab, spec, steps, seed, "training")
            zeros = [float((ternary(layer.weight)[0] == 0).double().mean()) for layer in _layers(model)] or [0.0]
            return {"held-out loss": held_out_loss(lab, model), "zeros": sum(zeros) / len(zeros)}

        return measures

    verdict = lab.compare(
        arms={
            "ternary": arm(ours),
            "no gradient": arm(replace(ours, linear=blocked, head=blocked)),
            "full precision": arm(replace(ours, linear=None, head=None)),
            "transformer": arm(character_llama(dim=dim, depth=depth, hidden=hidden)),
        },
        main=Beats("ternary", "no gradient", on="held-out loss", by=0.5, lower=True),
        also=[
            Within("ternary", "full precision", on="held-out loss", by=0.25, lower=True),
            Within("ternary", "transformer", on="held-out loss", by=0.25, lower=True),
            AtLeast("ternary", 0.2, on="zeros"),
            AtMost("ternary", 0.5, on="zeros"),
        ],
        seeds=2,
        note=f"{depth} layers, width {dim}, {steps} steps of 1,024 characters, peak rate {LR}; nats a character on the "
        "last tenth of the play. The version in full precision has plain layers, without their norms.",
    )
    lab.points("held-out loss", name="losses", title="Without products of matrices: nats a character")
    return verdict
