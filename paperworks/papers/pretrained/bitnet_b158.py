"""BitNet b1.58: every weight of a language model is -1, 0 or 1, from the first step of training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from paperworks import compress
from paperworks.compress.formats.ternary import Ternary
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
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
    equation=(
        r"\tilde W = \operatorname{clip}(\operatorname{round}(W / \gamma), -1, 1), \quad \gamma = \tfrac{1}{nm} \sum "
        r"|W_{ij}|"
    ),
    usage="""
import torch
from paperworks import compress
from paperworks.compress.formats.ternary import Ternary
from paperworks.models.presets.bitnet import bitnet
from paperworks.nn import BitLinear

model = bitnet(128, 2, 4, 256, vocab_size=97).build()  # linear=BitLinear(): rounded in training too
tokens = torch.randint(97, (1, 16))
before = model.eval()(tokens)
packed = compress.apply(model, Ternary(norm=BitLinear().eps))
print("difference:", float((packed(tokens) - before).detach().abs().max()))
print(compress.report(packed).bits_per_weight, "bits a weight")
""",
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
    draws = lab.generator(lab.seed)
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
    tokens = torch.randint(97, (2, 32), generator=lab.generator(lab.seed))
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
    reach="real",
)
def learns(lab: Lab) -> Verdict:
    """Train LLaMA and BitNet alike on characters of tinyshakespeare; then round LLaMA, and pack BitNet."""
    steps = lab.pick(smoke=2, small=350, large=3000)
    play()  # before the bars: it may have to be fetched
    full = character_llama(dim=lab.pick(smoke=32, small=128), depth=lab.pick(smoke=1, small=2), hidden=352)

    @cache
    def model(kind: BitLinear | None, seed: int) -> DecoderModel:
        return trained(lab, replace(full, linear=kind), steps, seed, "training")

    def rounded(seed: int) -> DecoderModel:
        found = copy.deepcopy(model(None, seed))
        convert_linears(found.blocks, BitLinear(norm=False))  # its own norms stay what they were
        return found

    def packed(seed: int) -> DecoderModel:
        return compress.apply(copy.deepcopy(model(BitLinear(), seed)), Ternary(norm=BitLinear().eps))

    def arm(make: Callable[[int], DecoderModel]) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"held-out loss": held_out_loss(lab, make(seed))}

    verdict = lab.compare(
        arms={
            "ternary": arm(lambda seed: model(BitLinear(), seed)),
            "rounded afterwards": arm(rounded),
            "full precision": arm(lambda seed: model(None, seed)),
            "ternary, packed": arm(packed),
        },
        main=Beats("ternary", "rounded afterwards", on="held-out loss", by=0.3, lower=True),
        also=[
            Within("ternary", "full precision", on="held-out loss", by=0.15, lower=True),
            Within("ternary, packed", "ternary", on="held-out loss", by=1e-4),
        ],
        seeds=2,
        note=f"2 layers, width 128, {steps} steps of 1,024 characters, peak rate {LR} for both; nats a character on "
        "the last tenth of the play. Embedding, head and norms stay in full precision.",
    )
    lab.points("held-out loss", name="losses", title="Nats a character, held out")
    return verdict
