"""BitNet b1.58: every weight of a language model is -1, 0 or 1, from the first step of training."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from paperworks import compress
from paperworks.compress.formats.ternary import Ternary
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.models.presets.bitnet import bitnet
from paperworks.nn import BitLinear
from paperworks.nn.linear_kind import convert_linears
from paperworks.nn.ternary import TernaryLinear, eight_bits, pack, ternary, unpack
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, play, trained

paper = Paper(
    key="bitnet-b158",
    title="The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits",
    authors="Ma, Wang, Ma, Wang, Wang, Huang, Dong, Wang, Xue, Wei",
    year=2024,
    ref="arXiv:2402.17764",
    family="pretrained",
    summary=(
        "Linear layers whose weights are rounded to -1, 0 and 1 times one scale and whose inputs are rounded to eight "
        "bits, in training as well: products become sums of integers, and little is lost beside full precision."
    ),
    implements=(
        "paperworks.nn.ternary.BitLinear",
        "paperworks.compress.formats.ternary.Ternary",
        "paperworks.models.presets.bitnet.bitnet",
    ),
)

GAUSSIAN_ZEROS = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))  # P(|w| < mean|w| / 2) = 0.310


def _layer(inputs: int, outputs: int) -> TernaryLinear:
    made = BitLinear().convert(nn.Linear(inputs, outputs, bias=False))
    assert isinstance(made, TernaryLinear)
    return made


def _zeros(signs: Tensor) -> float:
    return float((signs == 0).double().mean())


@paper.claim(
    "A ternary layer is a sum of integers times two scales, and does not care how large its weights are",
    paper="Section 2: W~ = RoundClip(W / (gamma + eps), -1, 1), gamma = mean |W|; log2(3) = 1.58 bits a weight",
    kind="exact",
    control="gamma as the largest magnitude, not the mean",
)
@torch.no_grad()
def arithmetic(lab: Lab) -> Verdict:
    """Compare with sums of integers bit for bit; scale weights; count zeros of a Gaussian matrix."""
    draws = torch.Generator().manual_seed(lab.seed)
    size = lab.pick(smoke=128, small=1024)
    weight = torch.randn(size, size, generator=draws, dtype=torch.float64)
    signs, gamma = ternary(weight)
    scaled, scaled_gamma = ternary(4 * weight)  # a power of two leaves every quotient as it was
    torch.manual_seed(lab.seed)
    layer, x = _layer(64, 48).double(), torch.randn(16, 64, generator=draws, dtype=torch.float64)
    integers, step = eight_bits(nn.functional.rms_norm(x, (64,), None, layer.spec.eps))
    layer_signs, scale = ternary(layer.weight)
    summed = integers.long() @ layer_signs.long().t()
    by_max = (weight / weight.abs().max()).round()
    return lab.judge(
        checks={
            "the layer is the integer product times its scales, bit for bit": torch.equal(
                layer(x), summed.double() * step * scale
            ),
            "additions and subtractions alone give it too": torch.equal(layer(x), layer.accumulated(x)),
            "weights are -1, 0 and 1": signs.unique().tolist() == [-1.0, 0.0, 1.0],
            "inputs are integers of eight bits": bool((integers == integers.round()).all())
            and float(integers.abs().max()) == 127,
            "W -> 4 W changes the scale alone": torch.equal(scaled, signs) and bool(scaled_gamma == 4 * gamma),
            "0.310 of a Gaussian matrix are zeros": abs(_zeros(signs) - GAUSSIAN_ZEROS) < 0.005,
            "with the largest magnitude as scale, more than 0.9 are": _zeros(by_max) > 0.9,
        },
        measured={
            "bits, log2(3)": math.log2(3),
            "share of zeros": _zeros(signs),
            "share expected": GAUSSIAN_ZEROS,
            "products compared": summed.numel(),
        },
        control={"share of zeros, scale by the largest magnitude": _zeros(by_max)},
    )


@paper.claim(
    "Weights take 1.6 or 2 bits in memory, which is the saving that the paper reports at 3B",
    paper="Table 1: 3B takes 2.22 GB, LLaMA 7.89 GB",
    kind="exact",
    control="the same matrices in 16 bits",
)
@torch.no_grad()
def memory(lab: Lab) -> Verdict:
    """Pack and unpack every byte; count bytes of the 3B model without memory; compare a packed model's logits."""
    every = torch.tensor([[place // 3**digit % 3 - 1 for digit in range(5)] for place in range(243)], dtype=torch.int8)
    packed = pack(every)
    spec = bitnet(3200, 26, 32, 8640)
    with torch.device("meta"):
        shapes = [(x.out_features, x.in_features) for x in spec.build().modules() if isinstance(x, TernaryLinear)]
    weights = sum(rows * columns for rows, columns in shapes)
    formats = {"digits": Ternary(packing="digits", norm=BitLinear().eps)}
    formats["bits"] = replace(formats["digits"], packing="bits")
    held = {
        name: sum(form.bits_per_weight(shape) * math.prod(shape) for shape in shapes) / 8
        for name, form in formats.items()
    }
    saved = (2 * weights - held["bits"]) / 1e9
    torch.manual_seed(lab.seed)
    model = replace(bitnet(128, 2, 4, 256, vocab_size=97), init_std=0.2).build().eval()
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(lab.seed))
    before = model(tokens)
    same = [torch.equal(compress.apply(copy.deepcopy(model), form)(tokens), before) for form in formats.values()]
    lab.table(
        "The linear layers of the 3B model",
        ["stored as", "bits a weight", "GB"],
        [
            ["16 bits", 16.0, 2 * weights / 1e9],
            ["four ternary digits a byte", 8 * held["bits"] / weights, held["bits"] / 1e9],
            ["five ternary digits a byte", 8 * held["digits"] / weights, held["digits"] / 1e9],
        ],
    )
    return lab.judge(
        checks={
            "all 243 bytes of five digits come back": torch.equal(unpack(packed, 5), every)
            and len(packed.unique()) == 243,
            "a packed model gives the same logits, bit for bit": all(same),
            "two bits a weight save what Table 1 saves, within 2%": abs(saved / (7.89 - 2.22) - 1) < 0.02,
            "five digits a byte are 1.6 bits": abs(8 * held["digits"] / weights - 1.6) < 0.001,
        },
        measured={
            "ternary weights of the 3B model": weights,
            "GB saved beside 16 bits": saved,
            "GB saved in Table 1": 7.89 - 2.22,
            "bits a weight, four digits a byte": 8 * held["bits"] / weights,
            "bits a weight, five digits a byte": 8 * held["digits"] / weights,
        },
        control={"GB in 16 bits": 2 * weights / 1e9},
        note=(
            "Table 1 also counts embeddings and what running takes, which both models have; only the difference is "
            "compared. The widths (3200, 8640, 26 layers) are those of the released 3B model."
        ),
    )


@paper.claim(
    "Trained ternary, a model learns nearly what full precision learns; rounded afterwards, it is lost",
    paper="Table 1: perplexity 10.04 for LLaMA 3B, 9.91 for BitNet b1.58; at 700M 12.33 and 12.87",
    control="the model in full precision, its layers made ternary after training",
)
def learns(lab: Lab) -> Verdict:
    """Train LLaMA and BitNet alike on characters of tinyshakespeare; then round LLaMA, and pack BitNet."""
    steps = lab.pick(smoke=2, small=450, large=3000)
    play()  # before the bars: it may have to be fetched
    full = character_llama(dim=lab.pick(smoke=32, small=128), depth=lab.pick(smoke=1, small=4), hidden=352)
    plain = trained(lab, full, steps, lab.seed, "full precision")
    model = trained(lab, replace(full, linear=BitLinear()), steps, lab.seed, "ternary")
    losses = {"full precision": held_out_loss(lab, plain), "ternary": held_out_loss(lab, model)}
    rounded = copy.deepcopy(plain)
    convert_linears(rounded.blocks, BitLinear(norm=False))  # its own norms stay what they were
    losses["rounded afterwards"] = held_out_loss(lab, rounded)
    zeros = [_zeros(ternary(layer.weight)[0]) for layer in _ternary_layers(model)]
    latent = torch.cat([(x.weight / ternary(x.weight)[1]).detach().flatten() for x in _ternary_layers(model)])
    packed = compress.apply(model, Ternary(norm=BitLinear().eps))
    losses["ternary, packed"] = held_out_loss(lab, packed)
    _draw(lab, losses, latent)
    return lab.judge(
        checks={
            "ternary is within 0.15 nats of full precision": losses["ternary"] <= losses["full precision"] + 0.15,
            "and at least 0.3 nats below rounding afterwards": (
                losses["ternary"] <= losses["rounded afterwards"] - 0.3
            ),
            "packed, it has the same loss": abs(losses["ternary, packed"] - losses["ternary"]) < 1e-4,
        },
        measured={
            "loss, ternary": losses["ternary"],
            "loss, full precision": losses["full precision"],
            "loss, ternary and packed": losses["ternary, packed"],
            "bits a weight, packed": compress.report(packed).bits_per_weight,
            "least and largest share of zeros": [min(zeros), max(zeros)],
        },
        control={"loss, rounded afterwards": losses["rounded afterwards"]},
        note=f"4 layers, width 128, {steps} steps of 1,024 characters, peak rate {LR} for both, seed {lab.seed}; nats "
        "a character on the last tenth of the play. Embedding, head and norms stay in full precision.",
    )


def _ternary_layers(model: DecoderModel) -> list[TernaryLinear]:
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]


def _draw(lab: Lab, losses: dict[str, float], latent: Tensor) -> None:
    with lab.figure("losses", figsize=(8.2, 3.2)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        names = ("full precision", "ternary", "rounded afterwards")
        for row, (name, color) in enumerate(zip(names, (COLORS[1], COLORS[0], CONTROL), strict=True)):
            left.barh(row, losses[name], color=color, height=0.6)
            left.text(losses[name] + 0.05, row, f"{losses[name]:.3f}", va="center", color=INK)
        left.set_yticks(range(3), names)
        left.set_ylim(2.6, -0.6)
        left.set_xlim(0, 1.2 * max(losses[name] for name in names))
        left.grid(axis="y", visible=False)
        left.set(title="Held-out loss", xlabel="nats a character")
        right.hist(latent.numpy(), bins=80, range=(-4, 4), color=COLORS[0])
        for edge in (-0.5, 0.5):
            right.axvline(edge, color=INK, linewidth=1, linestyle=":")
        right.set_yticks([])
        right.grid(axis="y", visible=False)
        right.text(0.98, 0.86, "zeros between\nthe lines", transform=right.transAxes, ha="right", color=INK)
        right.set(title="Weights before rounding", xlabel="multiples of the mean magnitude")
