"""k-bit scaling laws: given so many bits in all, how many to spend on each weight."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import torch
from torch import nn

from paperworks import compress
from paperworks.compress.formats.kbit import KBit, codebook
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
from paperworks.testbeds.characters import character_llama, held_out_loss, trained

paper = Paper(
    key="kbit-scaling",
    title="The case for 4-bit precision: k-bit Inference Scaling Laws",
    authors="Dettmers, Zettlemoyer",
    year=2022,
    ref="arXiv:2212.09720",
    family="quantization",
    summary=(
        "A model of fixed size on disk can have many coarse weights or few fine ones. Over families of models four "
        "bits a weight give the best model for the bits; small blocks and the data type decide how well four bits do."
    ),
    implements=("paperworks.compress.formats.kbit.KBit", "paperworks.compress.formats.kbit.codebook"),
)

# (width, depth, heads, feed-forward): 32 thousand to 0.9 million parameters
LADDER = ((32, 2, 4, 88), (48, 3, 4, 128), (64, 4, 4, 176), (96, 5, 4, 256), (128, 5, 4, 344))
BITS = (2, 3, 4, 5, 8)
TIED = 0.01  # nats: the catalogue's margin for a tie


def _models(lab: Lab) -> list[DecoderModel]:
    """Train the ladder, each model with the same windows and steps."""
    sizes = lab.pick(smoke=LADDER[:2], small=LADDER)
    steps = lab.pick(smoke=2, small=600, large=4000)
    return [
        trained(lab, character_llama(dim, depth, heads, hidden), steps, lab.seed, f"model {index + 1} of {len(sizes)}")
        for index, (dim, depth, heads, hidden) in enumerate(sizes)
    ]


def _rounded(lab: Lab, model: DecoderModel, format: KBit) -> tuple[float, float]:
    """Return (bits in all, held-out loss) with the blocks' linear layers in a format, the rest in 16 bits."""
    rounded = compress.apply(copy.deepcopy(model), format, "all-linear")
    stored = compress.report(rounded)
    linear = sum(layer.weights for layer in stored.layers)
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    return 8 * stored.bytes + 16 * rest, held_out_loss(lab, compress.decompress(rounded))


def at_budget(curve: list[tuple[float, float]], bits: float) -> float | None:
    """Return the loss at so many bits, linear in log2(bits) between measured models; None outside of them."""
    curve = sorted(curve)
    for (low, loss_low), (high, loss_high) in pairwise(curve):
        if low <= bits <= high:
            share = math.log2(bits / low) / math.log2(high / low)
            return loss_low + share * (loss_high - loss_low)
    return None


@paper.claim(
    "At equal bits in all, four bits a weight give the best model",
    paper="Figure 1, Section 4: 4-bit precision is almost universally optimal for total model bits against accuracy",
    control="the same bits spent as 3 and as 8 bits a weight, on larger and smaller models",
)
def four_bits_are_best(lab: Lab) -> Verdict:
    """Round a ladder of character models at 2 to 8 bits and read the loss at equal budgets off the curves."""
    models = _models(lab)
    curves = {
        bits: [_rounded(lab, model, KBit(bits=bits)) for model in models]
        for bits in lab.track(list(BITS), "bits a weight")
    }
    low, high = max(min(curve)[0] for curve in curves.values()), min(max(curve)[0] for curve in curves.values())
    budgets = [low * (high / low) ** (step / 6) for step in range(7)] if high > low else [min(curves[4])[0]]
    losses = {bits: [at_budget(curve, budget) for budget in budgets] for bits, curve in curves.items()}
    wins = sum(
        all(
            losses[4][i] is not None and (other[i] is None or losses[4][i] <= other[i] + TIED)  # type: ignore[operator]
            for other in losses.values()
        )
        for i in range(len(budgets))
    )
    middle = len(budgets) // 2
    _draw(lab, curves)
    lab.table(
        "Held-out loss in nats a character",
        ["bits a weight", *(f"model {index + 1}" for index in range(len(models)))],
        [[bits, *(loss for _, loss in curve)] for bits, curve in curves.items()],
    )
    return lab.judge(
        checks={
            "four bits best, or tied within 0.01 nats, at three budgets or more": wins >= 3,
            "three bits worse at the middle budget": _more(losses[3][middle], losses[4][middle]),
            "eight bits worse at the middle budget": _more(losses[8][middle], losses[4][middle]),
        },
        measured={"budgets where four bits are best": wins, "budgets": len(budgets), "loss, 4 bits": losses[4][middle]},
        control={"loss, 3 bits": losses[3][middle], "loss, 8 bits": losses[8][middle]},
        note="tinyshakespeare, one character a token; the linear layers in blocks of 64, all else in 16 bits.",
    )


def _more(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one > other


def _draw(lab: Lab, curves: dict[int, list[tuple[float, float]]]) -> None:
    with lab.figure("budgets", figsize=(6.4, 3.6)) as figure:
        axes = figure.subplots()
        for index, (bits, curve) in enumerate(curves.items()):
            xs, ys = zip(*sorted(curve), strict=True)
            axes.plot(
                xs,
                ys,
                "o--" if bits == 8 else "o-",
                color=CONTROL if bits in (2, 8) else COLORS[index % len(COLORS)],
                linewidth=2.4 if bits == 4 else 1.2,
                markersize=4,
                label=f"{bits} bits",
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bits of the whole model")
        axes.set_ylabel("held-out loss, nats a character")
        axes.set_title("What the same number of bits buys")
        axes.legend(frameon=False)


@paper.claim(
    "Small blocks improve three and four bits; the data type matters less than the bits",
    paper="Section 5.2: block size and data type are what improves 4-bit scaling; below 6 bits they matter",
    control="blocks of 1024, a sixteenth of the constants",
)
def small_blocks_help(lab: Lab) -> Verdict:
    """Round one character model at three and four bits in blocks of 32, 64 and 1024, by four data types."""
    dim, depth, heads, hidden = lab.pick(smoke=LADDER[0], small=LADDER[2])
    model = trained(lab, character_llama(dim, depth, heads, hidden), lab.pick(smoke=2, small=600), lab.seed, "model")
    dense = held_out_loss(lab, model)
    found = {
        (kind, bits, block): _rounded(lab, model, KBit(bits=bits, kind=kind, block=block))[1] - dense
        for kind in ("int", "float", "quantile", "dynamic")
        for bits in (3, 4)
        for block in (32, 64, 1024)
    }
    lab.table(
        "Rise of the held-out loss, nats a character",
        ["data type", "bits", "block 32", "block 64", "block 1024"],
        [
            [kind, bits, *(found[kind, bits, block] for block in (32, 64, 1024))]
            for kind in ("int", "float", "quantile", "dynamic")
            for bits in (3, 4)
        ],
    )
    int3, int4 = found["int", 3, 64], found["int", 4, 64]
    return lab.judge(
        checks={
            "int: blocks of 64 better than of 1024 at 3 and 4 bits": int3 < found["int", 3, 1024]
            and int4 < found["int", 4, 1024],
            "blocks of 32 at least as good as of 64, within 0.01 nats": found["int", 3, 32] <= int3 + TIED
            and found["int", 4, 32] <= int4 + TIED,
            "quantile or float better than int at 3 bits": min(found["quantile", 3, 64], found["float", 3, 64]) < int3,
        },
        measured={"rise, int 4, block 64": int4, "rise, int 3, block 64": int3, "loss, not rounded": dense},
        control={"rise, int 4, block 1024": found["int", 4, 1024], "rise, int 3, block 1024": found["int", 3, 1024]},
    )


@paper.claim(
    "A weight takes k + 16/B bits, and 2% of the inputs in 16 bits make four bits 4.24",
    paper="Section 3: block constants of 16 bits; Section 5.3: proxy outlier quantization",
    kind="exact",
)
def bits_are_accounted(lab: Lab) -> Verdict:
    """Count the stored bytes of rounded layers, and the values of each data type."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(lab.seed))
    layer = nn.Linear(256, 256, bias=False)
    layer.weight = nn.Parameter(weight)
    rounded = compress.apply(nn.Sequential(layer), KBit(bits=4), "*")
    account = compress.report(rounded)
    outliers, rest = weight[:, :5].half(), KBit(bits=4, block=None).encode(weight[:, 5:250])
    mixed = 8 * (outliers.nbytes + rest["codes"].nbytes) / (256 * 250)
    levels = {k: len(codebook("int", k)) for k in BITS}
    symmetric = all(
        bool(torch.allclose(codebook("int", k), -codebook("int", k).flip(0))) for k in BITS
    ) and torch.allclose(codebook("float", 4), -codebook("float", 4).flip(0))
    return lab.judge(
        checks={
            "4.25 bits at four bits in blocks of 64": account.bits_per_weight == 4.25,
            "4.24 bits with 5 of 250 inputs in 16 bits": mixed == 4.24,
            "2^k - 1 levels": all(count == 2**k - 1 for k, count in levels.items()),
            "symmetric": symmetric,
            "every linear layer of a model is counted": [layer.path for layer in account.layers] == ["0"],
        },
        measured={
            "bits, 4-bit blocks of 64": account.bits_per_weight,
            "bits, 2% outliers": mixed,
            "levels at 4 bits": levels[4],
        },
    )
