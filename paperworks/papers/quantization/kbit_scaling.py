"""k-bit scaling laws: given so many bits in all, how many to spend on each weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from paperworks import compress, train
from paperworks.compress.formats.kbit import DataType, KBit, codebook
from paperworks.core.linear import weight_of
from paperworks.core.selection import select_linears
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.testbeds.characters import LENGTH, character_llama, play, trained

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
    equation=r"\text{bits in all} = \sum_W |W| \left( k + \tfrac{16}{B} \right) + 16 \, |\text{rest}|",
    usage="""
import torch
from paperworks import compress

for bits in (3, 4, 8):
    for block in (64, 1024):
        model = torch.nn.Sequential(torch.nn.Linear(512, 256))
        x = torch.randn(32, 512)
        exact = model(x)
        out = compress.apply(model, compress.KBit(bits=bits, kind="quantile", block=block))(x)
        size = compress.report(model).bits_per_weight
        print(bits, "bits, block", block, "stored", size, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="The paper's families have 19 million to 176 billion parameters and are scored by zero-shot accuracy; here "
    "character models of 30 to 210 thousand parameters are scored by their loss.",
)

# (width, depth, heads, feed-forward)
LADDER = ((32, 2, 4, 88), (48, 3, 4, 128), (64, 4, 4, 176))
BITS = (3, 4, 8)
MARGIN = 0.01  # nats: nearer than that is a tie


@cache
def _trained(size: tuple[int, int, int, int], steps: int, seed: int) -> DecoderModel:
    return trained(Lab(), character_llama(*size), steps, seed, "")


def _model(lab: Lab, size: tuple[int, int, int, int], seed: int) -> DecoderModel:
    """A model of the ladder; all of them see the same windows of a seed."""
    return _trained(size, lab.pick(smoke=2, small=200, large=4000), seed)


def _loss(lab: Lab, model: DecoderModel, format: KBit | None) -> float:
    """Nats a character on held-out text, with the blocks' linear layers in a format."""
    if format is not None:
        model = compress.decompress(compress.apply(copy.deepcopy(model), format, "all-linear"))
    windows = play().held_out_windows(length=LENGTH, count=lab.pick(smoke=8, small=160))
    with lab.threads(1):
        return train.evaluate(model, train.next_token_loss, windows)["loss"]


def _bits_in_all(size: tuple[int, int, int, int], bits: int) -> float:
    """Bits of a model whose linear layers have so many bits a weight, and all else 16."""
    model = character_llama(*size).build()
    weights = [weight_of(layer) for layer in select_linears(model, "all-linear").values()]
    linear = sum(
        weight.numel() * KBit(bits=bits).bits_per_weight((weight.shape[0], weight.shape[1])) for weight in weights
    )
    rest = sum(value.numel() for value in model.parameters()) - sum(weight.numel() for weight in weights)
    return linear + 16 * rest


def at_budget(curve: list[tuple[float, float]], bits: float) -> float:
    """Loss at so many bits, linear in log2(bits) between measured models.

    Raises ValueError outside of them.
    """
    for (low, loss_low), (high, loss_high) in pairwise(sorted(curve)):
        if low <= bits <= high:
            return loss_low + math.log2(bits / low) / math.log2(high / low) * (loss_high - loss_low)
    raise ValueError(
        f"a budget of {bits:.4g} bits lies outside of the measured {min(curve)[0]:.4g} to {max(curve)[0]:.4g}"
    )


@paper.claim(
    "At equal bits in all, four bits a weight give the best model",
    paper="Figure 1, Section 4: 4-bit precision is almost universally optimal for total model bits against accuracy",
    control="the same bits spent as 8 bits a weight on smaller models, and as 3 bits on larger ones",
)
def four_bits_are_best(lab: Lab) -> Verdict:
    """Round a ladder of character models at 3, 4 and 8 bits and read the loss at equal budgets off the curves."""
    ladder = LADDER[:2] if lab.scale == "smoke" else LADDER
    sizes = {bits: [_bits_in_all(size, bits) for size in ladder] for bits in BITS}
    low, high = max(min(found) for found in sizes.values()), min(max(found) for found in sizes.values())
    budgets = [low * (high / low) ** share for share in (0.0, 0.25, 0.5, 0.75, 1.0)] if low < high else [sizes[4][0]]

    def arm(bits: int) -> Callable[[int], dict[str, float]]:
        def loss(seed: int) -> dict[str, float]:
            losses = [_loss(lab, _model(lab, size, seed), KBit(bits=bits)) for size in ladder]
            curve = list(zip(sizes[bits], losses, strict=True))
            # A smoke run's two models share no budget.
            read = [at_budget(curve, budget) for budget in budgets] if low < high else losses
            return {"loss at equal bits": fmean(read), "smallest model": losses[0], "largest model": losses[-1]}

        return loss

    verdict = lab.compare(
        arms={f"{bits} bits": arm(bits) for bits in BITS},
        main=Beats("4 bits", "8 bits", on="loss at equal bits", by=MARGIN, lower=True),
        also=[Beats("4 bits", "3 bits", on="loss at equal bits", by=MARGIN, lower=True)],
        seeds=3,
        measured={"budgets, bits": budgets},
        note="Mean over five budgets of the loss in nats a character. tinyshakespeare, one character a token; the "
        "linear layers in blocks of 64, all else in 16 bits. Less than 0.01 nats apart is a tie and no win.",
    )
    lab.points("loss at equal bits", title="Loss of character models that take equally many bits")
    return verdict


@paper.claim(
    "Small blocks improve three and four bits, and so does the data type at three",
    paper="Section 5.2: block size and data type are what improves 4-bit scaling; below 6 bits they matter",
    control="blocks of 1024, a sixteenth of the constants; and integers in blocks of 64",
)
def small_blocks_help(lab: Lab) -> Verdict:
    """Round one character model at three and four bits in blocks of 64 and 1024, by three data types."""
    size = LADDER[0] if lab.scale == "smoke" else LADDER[2]

    def arm(kind: DataType, block: int) -> Callable[[int], dict[str, float]]:
        def lost(seed: int) -> dict[str, float]:
            model = _model(lab, size, seed)
            dense = _loss(lab, model, None)
            return {
                f"nats lost at {bits} bits": _loss(lab, model, KBit(bits=bits, kind=kind, block=block)) - dense
                for bits in (3, 4)
            }

        return lost

    ours, plain, quantile, floating = "int, 64", "int, 1024", "quantile, 64", "float, 64"
    verdict = lab.compare(
        arms={
            ours: arm("int", 64),
            plain: arm("int", 1024),
            quantile: arm("quantile", 64),
            floating: arm("float", 64),
        },
        main=Beats(ours, plain, on="nats lost at 3 bits", by_ratio=0.2, lower=True),
        also=[
            Beats(ours, plain, on="nats lost at 4 bits", by_ratio=0.2, lower=True),
            Beats(quantile, ours, on="nats lost at 3 bits", lower=True),
        ],
        seeds=3,
    )
    lab.points("nats lost at 3 bits", name="blocks", title="What three bits cost a character model, nats")
    return verdict


@paper.claim(
    "A weight takes k + 16/B bits, and 2% of the inputs in 16 bits make four bits 4.24",
    paper="Section 3: block constants of 16 bits; Section 5.3: proxy outlier quantization",
    kind="exact",
)
def bits_are_accounted(lab: Lab) -> Verdict:
    """Count the stored bytes of rounded layers, and the values of each data type."""
    weight = torch.randn(256, 256, generator=lab.generator(lab.seed))
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
