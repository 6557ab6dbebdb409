"""Every weight format on one model: what each costs in bits, and how far it moves the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import compress, train
from paperworks.compress import WeightFormat
from paperworks.compress.ggml.format import K_FALLBACKS
from paperworks.interpret.probing.separation import rank_correlation as rank_correlation
from paperworks.lab import Lab
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.choices import Choice, answered
from paperworks.testbeds.rounded_smollm2 import Subject

CEILING = 8  # times the perplexity of the model as loaded: what lies above is drawn at the edge, with its number

Lines = Mapping[str, Mapping[str, WeightFormat]]


def lines(group: int) -> Lines:
    """Return formats by line of the plot, each of falling precision; `group` weights share a scale where it is free.

    AQLM and QuIP# search once or twice where the papers search longer, so that a whole model takes minutes.
    """
    return {
        "round to nearest": {f"RTN-{b}": compress.Uniform(bits=b, group=group) for b in (4, 3, 2)},
        "GPTQ": {f"GPTQ-{b}": compress.GPTQ(bits=b, group=group) for b in (4, 3, 2)},
        "AWQ": {f"AWQ-{b}": compress.AWQ(bits=b, group=group) for b in (4, 3)},
        "8 bits, activations too": {
            "int8": compress.LLMInt8(),
            "FP8": compress.FP8(),
            "SmoothQuant": compress.SmoothQuant(),
        },
        "k-quants": {kind: _k_quant(kind) for kind in ("Q6_K", "Q4_K", "Q3_K", "Q2_K")},
        "4-bit codebooks": {
            "NF4": compress.NF4(double_quantization=True),
            "FP4": compress.FP4(double_quantization=True),
        },
        "lattices": {"QuIP#-2": compress.QuIPSharp(bits=2, passes=2)},
        "learned codebooks": {"AQLM-2": compress.AQLM(epochs=1)},
    }


def _k_quant(kind: str) -> WeightFormat:
    return compress.GGML(kind=kind, fallback=K_FALLBACKS[kind])


@dataclass(frozen=True)
class Score:
    """What a format costs: bits a weight of the linear layers, and how far the model's predictions moved."""

    bits: float
    perplexity: float
    divergence: float  # mean KL(dense || rounded) of the next token, in nats
    flips: float  # share of tokens whose most likely successor changed
    right: float | None = None  # share of multiple-choice questions answered as they should be


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: Tensor, context: int) -> list[Float[Tensor, "time vocab"]]:
    """Return the model's log probabilities of the next token, window by window."""
    return [model(window[None])[0].log_softmax(-1) for window in tokens.split(context - 1) if len(window) > 1]


def score_model(
    model: nn.Module, bits: float, known: Subject, dense: list[Tensor], choices: list[Choice] | None = None
) -> Score:
    """Compare a rounded model's predictions with those of the model as loaded."""
    divergence, flips, count = 0.0, 0, 0
    for wanted, found in zip(dense, log_probabilities(model, known.tokens, known.context), strict=True):
        divergence += float((wanted.exp() * (wanted - found)).sum())
        flips += int((wanted.argmax(-1) != found.argmax(-1)).sum())
        count += len(wanted)
    return Score(
        bits,
        train.perplexity(model, known.tokens, known.context),
        divergence / count,
        flips / count,
        answered(model, choices) if choices else None,
    )


def scored(
    lab: Lab, known: Subject, formats: Mapping[str, WeightFormat], choices: list[Choice] | None = None
) -> dict[str, Score]:
    """Return the score of each format, and of the model "as loaded"."""
    dense = log_probabilities(known.model, known.tokens, known.context)
    found = {"as loaded": score_model(known.model, 32.0, known, dense, choices)}
    for name, format in lab.track(list(formats.items()), "formats"):
        model = known.rounded(format)
        bits = compress.report(model).bits_per_weight
        if not _own_arithmetic(format):
            model = compress.decompress(model)  # the same numbers, decoded once
        found[name] = score_model(model, bits, known, dense, choices)
    return found


def _own_arithmetic(format: WeightFormat) -> bool:
    return type(format).multiply is not WeightFormat.multiply


def pareto(scores: Mapping[str, Score]) -> list[str]:
    """Return the formats to which no other is at once smaller and better, from many bits to few."""
    best: list[str] = []
    for name in sorted(scores, key=lambda name: (scores[name].perplexity, scores[name].bits)):
        if not best or scores[name].bits < scores[best[-1]].bits:
            best.append(name)
    return best


def show(lab: Lab, title: str, found: Mapping[str, Score]) -> list[str]:
    """Write the table; return the names on the Pareto front."""
    rounded = {name: score for name, score in found.items() if name != "as loaded"}
    front = pareto(rounded)
    questions = any(score.right is not None for score in found.values())
    columns = ["format", "bits a weight", "perplexity", "KL, nats", "changed predictions"]
    rows = [
        [
            name,
            x.bits,
            x.perplexity,
            x.divergence,
            f"{x.flips:.1%}",
            *([f"{x.right:.0%}" if x.right is not None else ""] if questions else []),
            "yes" if name in front else "",
        ]
        for name, x in sorted(found.items(), key=lambda item: -item[1].bits)
    ]
    lab.table(title, [*columns, *(["questions right"] if questions else []), "Pareto front"], rows)
    return front


def draw(lab: Lab, name: str, title: str, found: Mapping[str, Score], group: int) -> None:
    """Plot perplexity against bits, one line a method, and mark the Pareto front; what is off the scale says so."""
    dense = found["as loaded"].perplexity
    front = pareto({key: score for key, score in found.items() if key != "as loaded"})
    ceiling = min(max(score.perplexity for score in found.values()), CEILING * dense)
    with lab.figure(name, figsize=(7.8, 4.8)) as figure:
        axes = figure.subplots()
        points: list[tuple[float, float, str]] = []
        for index, (line, formats) in enumerate(lines(group).items()):
            known = [key for key in formats if key in found]
            if not known:
                continue
            xs = [found[key].bits for key in known]
            ys = [min(found[key].perplexity, ceiling) for key in known]
            color = CONTROL if line == "round to nearest" else COLORS[index % len(COLORS)]
            axes.plot(xs, ys, f"{'s' if index >= len(COLORS) else 'o'}-", color=color, label=line, markersize=5)
            for key, x, y in zip(known, xs, ys, strict=True):
                off = found[key].perplexity > ceiling
                points.append((x, y, f"{key}: {found[key].perplexity:,.0f} \u2191" if off else key))
        axes.plot(
            [found[key].bits for key in front],
            [min(found[key].perplexity, ceiling) for key in front],
            "o",
            markersize=11,
            fillstyle="none",
            color="black",
            label="Pareto front",
        )
        axes.axhline(dense, linewidth=0.8, linestyle=":", color="black")
        axes.set_yscale("log")
        span = ceiling / dense
        axes.set_ylim(dense * span**-0.06, ceiling * span**0.06)
        axes.set_xlim(min(x for x, _, _ in points) - 0.75, max(x for x, _, _ in points) + 0.9)
        ticks = [dense * span ** (step / 5) for step in range(6)]
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("bits a weight of the linear layers, scales and codebooks included")
        axes.set_title(title)
        axes.legend(fontsize=7, frameon=False)
        _label(axes, points)


def _label(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, on the side where it covers least of what is written already."""
    taken: list[tuple[float, float, float, float]] = []
    places = [axes.transData.transform((x, y)) * 72 / axes.figure.dpi for x, y, _ in points]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (x, y, text), (px, py) in sorted(zip(points, places, strict=True), key=lambda item: -item[1][1]):
        width, height = 3.9 * len(text), 8.0
        best, least = (6.0, 3.0), float("inf")
        for dx, dy in _SIDES:
            left = px + (dx if dx > 0 else dx - width if dx < 0 else -width / 2)
            box = (left, py + dy - 1, left + width, py + dy + height)
            covered = sum(_overlap(box, other) for other in (*taken, *marks)) + 0.02 * (abs(dx) + abs(dy))
            if covered < least:
                best, least, chosen = (dx, dy), covered, box
        taken.append(chosen)
        side = "left" if best[0] > 0 else "right" if best[0] < 0 else "center"
        axes.annotate(text, (x, y), textcoords="offset points", xytext=best, fontsize=7, ha=side)


_SIDES = [(dx, dy) for dy in (3.0, -9.0, 9.0, -17.0, 17.0, -26.0) for dx in (6.0, -6.0, 0.0, 16.0, -16.0)]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the area that two boxes (left, low, right, high) share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0.0, min(one[3], other[3]) - max(one[1], other[1])
    )
