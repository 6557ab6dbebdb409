"""QuIP#: eight weights at once to the nearest point of a lattice, after a Hadamard transform with random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from paperworks.compress.calibration.ldlq import proxy_loss
from paperworks.compress.formats import e8p
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.formats.quip_sharp import QuIPSharp
from paperworks.kernels import hadamard
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.papers.quantization._calibrated_layers import calibrated_layers, geometric_mean
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="quip-sharp",
    title="QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks",
    authors="Tseng, Chee, Sun, Kuleshov, De Sa",
    year=2024,
    ref="arXiv:2402.04396",
    family="quantization",
    summary=(
        "A ball holds rotated weights better than a cube does: 65,536 points of the E8 lattice stand for eight weights "
        "each, found from a table of 256, and a randomized Hadamard transform makes the weights fit the ball."
    ),
    implements=(
        "paperworks.compress.formats.quip_sharp.QuIPSharp",
        "paperworks.compress.formats.e8p.nearest",
        "paperworks.compress.calibration.ldlq.descend",
        "paperworks.kernels.hadamard.transform",
    ),
)

# Of one number of variance 1: the best four levels (Max 1960), and the least any code of two bits can reach (4^-2).
LLOYD_MAX, BOUND = 0.1175, 0.0625


@paper.claim(
    "On SmolLM2 the lattice loses at most 0.85 of what QuIP's grid loses at two bits",
    paper="Table 4 and Table 1: QuIP# with E8P against QuIP at 2 bits; Figure 1: 3 bits scale better than 4",
    control="QuIP: the same feedback with four levels a weight; and GPTQ with a grid a row",
)
def lattice_beats_grid(lab: Lab) -> Verdict:
    """Round layers of SmolLM2 at 2, 3 and 4 bits and compare the output errors on text."""
    layers, words = calibrated_layers(lab, (0, 29))  # the first and the last: three blocks take over five minutes
    found: dict[str, list[float]] = {}
    with lab.threads(1):  # columns are rounded eight at a time: steps too small for two threads
        for layer in lab.track(layers, "layers"):
            for bits in (2, 3, 4):
                for name, value in (
                    ("QuIP#", layer.loss_in(QuIPSharp(bits=bits))),
                    ("QuIP", layer.loss_in(QuIP(bits=bits))),
                    ("GPTQ", layer.loss_by_row(bits, feedback=True)),
                ):
                    found.setdefault(f"{name}, {bits} bits", []).append(value)
            found.setdefault("QuIP#, one pass", []).append(layer.loss_in(QuIPSharp(passes=0)))
    mean = {name: geometric_mean(values) for name, values in found.items()}
    _draw_curves(lab, mean)
    lab.table(
        "Share of the output's energy lost, geometric mean over the layers",
        ["method", "2 bits", "3 bits", "4 bits"],
        [[name, *(mean[f"{name}, {bits} bits"] for bits in (2, 3, 4))] for name in ("QuIP#", "QuIP", "GPTQ")],
    )
    to_quip = mean["QuIP#, 2 bits"] / mean["QuIP, 2 bits"]
    return lab.judge(
        checks={
            "at most 0.85 of QuIP's loss at 2 bits": to_quip <= 0.85,
            "QuIP's at most half of GPTQ's": mean["QuIP, 2 bits"] <= 0.5 * mean["GPTQ, 2 bits"],
            "the passes after the first lower the loss": mean["QuIP#, 2 bits"] < mean["QuIP#, one pass"],
            "each bit more loses less": mean["QuIP#, 4 bits"] < mean["QuIP#, 3 bits"] < mean["QuIP#, 2 bits"],
        },
        measured={
            "loss, 2 bits": mean["QuIP#, 2 bits"],
            "loss, 3 bits": mean["QuIP#, 3 bits"],
            "loss, 4 bits": mean["QuIP#, 4 bits"],
            "loss, 2 bits, without further passes": mean["QuIP#, one pass"],
            "QuIP# over QuIP": to_quip,
        },
        control={
            "loss, QuIP, 2 bits": mean["QuIP, 2 bits"],
            "loss, GPTQ, 2 bits": mean["GPTQ, 2 bits"],
            "loss, QuIP, 4 bits": mean["QuIP, 4 bits"],
        },
        note=PROVENANCE + f"All linear layers of blocks 0 and 29; inputs from {words}, of the model as loaded.",
    )


def _draw_curves(lab: Lab, mean: dict[str, float]) -> None:
    with lab.figure("bits", figsize=(7.6, 3.2)) as figure:
        axes = figure.subplots()
        for name, color in (("GPTQ", CONTROL), ("QuIP", COLORS[1]), ("QuIP#", COLORS[0])):
            values = [mean[f"{name}, {bits} bits"] for bits in (2, 3, 4)]
            axes.plot((2, 3, 4), values, "o-", color=color)
            axes.annotate(name, (2, values[0]), xytext=(-8, 0), textcoords="offset points", ha="right", va="center",
                          color=INK)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks((2, 3, 4))
        axes.set_xlim(1.7, 4.1)
        axes.set_xlabel("bits a weight")
        axes.set_title("Share of the output's energy that rounding SmolLM2's layers loses")


@paper.claim(
    "E8P loses 0.091 of the variance of normal weights at two bits, where the best four levels lose 0.1175",
    paper="Section 4.1 and Figure 3: the elementwise error of the E8P codebook against others",
    control="the four levels that are best for one normal number at a time (Max 1960)",
)
def beats_the_best_levels(lab: Lab) -> Verdict:
    """Round normal numbers by the lattice and by the four best levels; measure mean squared errors."""
    draws = torch.Generator().manual_seed(lab.seed)
    x = torch.randn(lab.pick(smoke=2_000, small=32_000), 8, generator=draws)
    errors = {scale: float((e8p.table()[e8p.nearest(scale * x)] / scale - x).square().mean()) for scale in (1.03, 0.9)}
    levels = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])  # Max 1960, Table I
    scalar = float((x[..., None] - levels).square().amin(-1).mean())
    near = lab.pick(smoke=0.05, small=0.01)
    return lab.judge(
        checks={
            "at most 0.8 of the error of the best four levels": errors[1.03] <= 0.8 * scalar,
            "0.0912 at scale 1.03, within 1%": abs(errors[1.03] / 0.0912 - 1) < near,
            "0.0990 at scale 0.9, within 1%": abs(errors[0.9] / 0.0990 - 1) < near,
            "not below what is possible": errors[1.03] > BOUND,
            "the four levels lose 0.1175, within 1%": abs(scalar / LLOYD_MAX - 1) < near,
        },
        measured={"error, scale 1.03": errors[1.03], "error, scale 0.9": errors[0.9], "bound": BOUND},
        control={"error, four best levels": scalar},
    )


@paper.claim(
    "The codebook has 65,536 points made of 256, and the fast search finds the nearest of all",
    paper="Section 4.2: 2^16 points from 256 vectors, seven sign bits and a shift; 227 vectors of norm up to sqrt(10) "
    "and 29 of norm sqrt(12)",
    kind="exact",
)
def codebook_and_search(lab: Lab) -> Verdict:
    """Count the points, and compare the search by parity with one through all points."""
    table = e8p.table()
    shift = torch.where(torch.arange(len(table)) % 2 == 1, 0.25, -0.25)[:, None]
    sums = (table - shift).sum(1)
    norms = e8p.magnitudes().square().sum(1)
    draws = torch.Generator().manual_seed(lab.seed)
    x = torch.randn(lab.pick(smoke=300, small=10_000), 8, generator=draws)
    fast = table[e8p.nearest(x)]
    half = table.square().sum(1) / 2
    brute = table[torch.cat([(chunk @ table.T - half).argmax(1) for chunk in x.split(300)])]
    farther = ((fast - x).double().square().sum(1) - (brute - x).double().square().sum(1)).max().item()
    return lab.judge(
        checks={
            "65,536 different points": len(torch.unique(table, dim=0)) == 65_536,
            "with an even sum before the shift": bool((sums % 2 == 0).all()),
            "from 227 vectors and 29 of norm 12": [int((norms <= 10).sum()), int((norms == 12).sum())] == [227, 29],
            # scores are sums of 8 float32 products below 10: equally near points may differ by their rounding
            "no point is nearer than the one found, to 1e-5": farther < 1e-5,
        },
        measured={
            "vectors searched": len(x),
            "not the same point": int((fast != brute).any(1).sum()),
            "largest excess of squared distance": farther,
        },
    )


@paper.claim(
    "The randomized Hadamard transform is undone exactly and leaves the proxy loss as it is",
    paper="Section 3: W <- V W U^T with H turned along leaves tr(E H E^T) unchanged",
    kind="exact",
)
def transform_is_orthogonal(lab: Lab) -> Verdict:
    """Turn weights and second moments of the widths of SmolLM2 in float64, and back."""
    draws = torch.Generator().manual_seed(lab.seed)
    apart, changed = [], []
    for width in (576, 1536) if lab.scale != "smoke" else (48, 64):
        x = torch.randn(64, width, generator=draws, dtype=torch.float64)
        root = torch.randn(width, width, generator=draws, dtype=torch.float64)
        signs = 1.0 - 2.0 * torch.randint(2, (width,), generator=draws).double()
        moment = root @ root.T / width
        turned = _randomized(_randomized(moment, signs).T, signs)
        apart.append((hadamard.transform(hadamard.transform(x * signs), inverse=True) * signs - x).abs().max().item())
        changed.append(abs(float(proxy_loss(_randomized(x, signs), turned) / proxy_loss(x, moment)) - 1))
    return lab.judge(
        checks={
            "undone to 1e-12": max(apart) < 1e-12,
            "the proxy loss is the same to 1e-12": max(changed) < 1e-12,
            "576 = 16 x 36 and 1536 = 128 x 12 have Hadamard matrices": (
                hadamard.is_hadamard(576) and hadamard.is_hadamard(1536)
            ),
        },
        measured={"largest difference": max(apart), "largest relative change of the loss": max(changed)},
    )


def _randomized(x: Tensor, signs: Tensor) -> Tensor:
    return hadamard.transform(x * signs)
