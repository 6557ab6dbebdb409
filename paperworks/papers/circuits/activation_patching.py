"""Activation patching: which part of a run is enough for an answer, and which is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.circuits.patching import (
    Patching,
    Site,
    aligned,
    answer_probability,
    gaussian_corruption,
    kl_divergence,
    logit_difference,
)
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.testbeds import induction_model as small
from paperworks.testbeds.capitals import CAPITALS, OTHER_WORD, SUBJECT, WORDS
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="activation-patching",
    title="How to Use and Interpret Activation Patching",
    authors="Heimersheim, Nanda",
    year=2024,
    ref="arXiv:2404.15255; Zhang & Nanda 2023, arXiv:2309.16042; ARENA 3.0 [1.3]",
    family="circuits",
    summary=(
        "Put what a model computed on one prompt into its run on another. Clean values in a corrupted run show what is "
        "enough for the behaviour, corrupted values in a clean run what is needed; the metric decides what can be seen."
    ),
    implements=(
        "paperworks.interpret.circuits.patching.Patching",
        "paperworks.interpret.circuits.patching.Site",
        "paperworks.interpret.circuits.patching.aligned",
        "paperworks.interpret.circuits.patching.gaussian_corruption",
    ),
    equation=r"\text{effect} = \frac{m(\text{patched}) - m(\text{corrupted})}{m(\text{clean}) - m(\text{corrupted})}",
    usage="""
import paperworks as pw
import torch
from paperworks.interpret.circuits.patching import Patching, Site, aligned, logit_difference

model = pw.load("smollm2")
clean, corrupted = aligned(["The capital of France is"], ["The capital of Italy is"], model.tokenizer)
paris, rome = (torch.tensor(model.tokenizer.encode(city)[:1]) for city in (" Paris", " Rome"))
patching = Patching(model, clean, logit_difference(paris, rome), corrupted)
for layer in (0, 10, 20, 29):
    at_country, at_end = (patching.effect([Site(f"blocks.{layer}", position)]) for position in (3, -1))
    print(f"after block {layer}: country {at_country:.2f}, last word {at_end:.2f}")
""",
    notes="Prompts 'The capital of X is the city of' in SmolLM2; the papers use GPT-2 and many more prompts. "
    "At the subject the best window's layers restore as much one by one, 1.12 in sum, as together, 1.01: nearly all of "
    "the answer either way.",
    budget_exception="Some 800 runs of SmolLM2 with one part replaced: 4 to 7 minutes.",
)


class _Gate(nn.Module):
    """Two parts that pass on one input each, and AND or OR of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Identity(), nn.Identity(), kind

    def forward(self, x: Float[Tensor, "batch 2"]) -> Float[Tensor, " batch"]:
        one, two = self.first(x[:, 0]), self.second(x[:, 1])
        return one * two if self.kind == "and" else one + two - one * two


@paper.claim(
    "Noising finds parts that work in series (AND), denoising parts that stand in for each other (OR)",
    paper="Section 3: in AND structures noising one part breaks the behaviour and denoising one restores nothing; in "
    "OR structures it is the other way round",
    kind="exact",
)
def directions_differ(lab: Lab) -> Verdict:
    """Patch one part of a Boolean network in both directions, and the whole stream of the hand-set model."""
    effects: dict[str, dict[str, float]] = {}
    for kind in ("and", "or"):
        effects[kind] = {}
        for direction in ("denoise", "noise"):
            one = Patching(
                _Gate(kind),
                torch.ones(1, 2),
                lambda y: y,
                torch.zeros(1, 2),
                direction=direction,
            )
            effects[kind][direction] = one.effect([Site("first")])
    model = small.hand_set(noise=0.05)
    clean, corrupted, answer, against = small.induction_pairs(lab, small.HAND_VOCAB)
    metric = logit_difference(answer, against)
    whole = [
        Patching(model, clean, metric, corrupted, direction=direction).effect([Site(f"blocks.{layer}")])
        for direction in ("denoise", "noise")
        for layer in (0, 1)
    ]
    same = Patching(model, clean, metric, clean)
    unmoved = same.score([Site("blocks.0"), Site("blocks.1.mixer.heads", None, 0)]) == same.clean_score
    rescaled = Patching(model, clean, lambda logits: 2 - 5 * metric(logits), corrupted)
    plain = Patching(model, clean, metric, corrupted)
    site = [Site("blocks.0.mixer.heads", 2, 0)]
    return lab.judge(
        checks={
            "AND: denoising one part restores nothing, noising it breaks all": effects["and"]
            == {"denoise": 0.0, "noise": 1.0},
            "OR: denoising one part restores all, noising it breaks nothing": effects["or"]
            == {"denoise": 1.0, "noise": 0.0},
            "the whole stream of any layer has effect 1, to 1e-5": max(abs(value - 1) for value in whole) < 1e-5,
            "identical prompts change nothing": unmoved,
            "the effect does not depend on the scale of the metric": abs(rescaled.effect(site) - plain.effect(site))
            < 1e-5,
        },
        measured={
            "AND, denoise and noise": list(effects["and"].values()),
            "OR, denoise and noise": list(effects["or"].values()),
            "whole stream": whole,
        },
    )


@paper.claim(
    "Patching finds both heads of an induction circuit, each at its own position",
    paper="ARENA [1.3]: a sweep over heads and positions lights up at the previous-token head on B and the induction "
    "head on the last A, and stays dark elsewhere",
    control="the same sites, filled with the clean values of another sequence",
)
def finds_the_induction_circuit(lab: Lab) -> Verdict:
    """Sweep all heads and positions of the hand-set model, whose other two heads are random."""
    paths = [f"blocks.{layer}.mixer.heads" for layer in (0, 1)]

    def arm(value: Literal["patch", "resample"]) -> Callable[[int], dict[str, float | list[float]]]:
        def swept(seed: int) -> dict[str, float | list[float]]:
            model = small.hand_set(noise=0.05, seed=seed)
            clean, corrupted, answer, against = small.induction_pairs(Lab(lab.scale, seed), small.HAND_VOCAB)
            places = range(clean.shape[1])
            sites = [[Site(path, place, head)] for path in paths for head in (0, 1) for place in places]
            patching = Patching(model, clean, logit_difference(answer, against), corrupted, value=value)
            effects = patching.sweep(sites).view(4, -1)
            circuit = min(effects[0, 2].item(), effects[2, -1].item())  # head 0.0 on B, head 1.0 on the last A
            effects[0, 2] = effects[2, -1] = 0.0
            return {"weaker of the two heads": circuit, "largest effect elsewhere": effects.abs().max().item()}

        return swept

    clean, other = "clean values", "values of another sequence"
    verdict = lab.compare(
        arms={clean: arm("patch"), other: arm("resample")},
        main=Beats(clean, other, on="weaker of the two heads", by=0.6),
        also=[
            AtLeast(clean, 0.8, on="weaker of the two heads"),
            AtMost(clean, 0.2, on="largest effect elsewhere"),
        ],
        note="Effects as shares of the answer restored; the seed draws the random heads and the sequences.",
    )
    lab.points("weaker of the two heads", name="circuit", title="Restored by the weaker head")
    return verdict


PAIRS = 4  # prompts of a seed


def _capital_pairs(lab: Lab, model: DecoderModel, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts, the same with another country, and both capitals; the seed draws countries and order."""
    tokenizer: Any = model.tokenizer
    every = list(CAPITALS.items())
    order = torch.randperm(len(every), generator=lab.generator(seed))[: lab.pick(smoke=2, small=PAIRS)]
    names = [every[index] for index in order.tolist()]
    prompts = [f"The capital of {country} is the city of" for country, _ in names]
    clean, corrupted = aligned(prompts, prompts[1:] + prompts[:1], tokenizer)
    answer = torch.tensor([tokenizer.encode(f" {city}")[0] for _, city in names], device=model.device)
    return clean.to(model.device), corrupted.to(model.device), answer, answer.roll(-1)


@paper.claim(
    "A probability hides the heads that work against the answer; logit difference and KL show them",
    paper="Sections 4.1 to 4.3 (and Zhang & Nanda, section 4): probabilities cannot fall below 0 and miss negative "
    "heads; logit difference is recommended",
    control="the same runs, judged by the probability of the answer",
    reach="real",
)
def probability_hides_negative_heads(lab: Lab) -> Verdict:
    """Denoise each head of SmolLM2's last ten blocks on capitals of countries, and judge every run by three metrics."""
    model = smollm2(lab, smoke_depth=2)
    attention: Any = model.blocks[0].mixer
    paths = [f"blocks.{index}.mixer.heads" for index in range(len(model.blocks))][-10:]

    @cache
    def swept(seed: int) -> dict[str, Tensor]:
        """Effects of all heads by each metric, from one sweep that notes what all metrics say of the same logits."""
        clean, corrupted, answer, against = _capital_pairs(lab, model, seed)
        with torch.no_grad():
            reference = model(clean)
        metrics = {
            "logit difference": logit_difference(answer, against),
            "KL": kl_divergence(reference),
            "probability": answer_probability(answer),
        }
        noted: dict[str, list[float]] = {name: [] for name in metrics}

        def note(logits: Tensor) -> Tensor:
            for name, metric in metrics.items():
                noted[name].append(metric(logits).double().mean().item())
            return metrics["logit difference"](logits)

        Patching(model, clean, note, corrupted).by_head(paths, attention.spec.heads)
        # The first two scores are those of the clean and the corrupted run.
        return {
            name: (torch.tensor(scores[2:]) - scores[1]) / (scores[0] - scores[1]) for name, scores in noted.items()
        }

    def arm(metric: str) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            effects = swept(seed)[metric]
            return {
                "lowest effect of a head": effects.min().item(),
                "heads below -0.02": int((effects < -0.02).sum()),
                "highest effect of a head": effects.max().item(),
            }

        return measured

    difference, probability, lowest = "logit difference", "probability", "lowest effect of a head"
    verdict = lab.compare(
        arms={name: arm(name) for name in (difference, "KL", probability)},
        main=Beats(difference, probability, on=lowest, by=0.1, lower=True),
        also=[Beats("KL", probability, on=lowest, by=0.1, lower=True), AtLeast(probability, -0.02, on=lowest)],
        seeds=3,
        note=f"{PAIRS} prompts 'The capital of X is the city of' a seed, corrupted by another country (symmetric token "
        "replacement).",
    )
    lab.points(lowest, name="metrics", title="Effect of the most negative head")
    return verdict


@paper.claim(
    "Token replacement and Gaussian noise on the subject trace the answer to the same places",
    paper="Section 2 and Zhang & Nanda, section 3: replacing tokens is preferred, Gaussian noise of three standard "
    "deviations can give other results",
    control="the same noise on another word of the prompt",
    reach="real",
)
def corruptions_agree(lab: Lab) -> Verdict:
    """Trace where SmolLM2 keeps the country under three corruptions, and correlate the maps."""
    model = smollm2(lab, smoke_depth=6)
    stream = [f"blocks.{index}" for index in lab.pick(smoke=(0, 5), small=(0, 8, 16, 22, 26))]

    @cache
    def trace(seed: int, noisy: int | None) -> Tensor:
        clean, corrupted, answer, against = _capital_pairs(lab, model, seed)
        metric = logit_difference(answer, against)
        if noisy is None:
            patching = Patching(model, clean, metric, corrupted)
        else:
            patching = Patching(model, clean, metric, corruption=gaussian_corruption(model, [noisy], seed=seed))
        return patching.by_position(stream, range(len(WORDS))).flatten()

    def arm(noisy: int) -> Callable[[int], dict[str, float]]:
        def agreement(seed: int) -> dict[str, float]:
            maps = torch.stack([trace(seed, None), trace(seed, noisy)])
            return {"correlation with token replacement": torch.corrcoef(maps)[0, 1].item()}

        return agreement

    subject, other, on = "noise on the country", "noise on 'city'", "correlation with token replacement"
    verdict = lab.compare(
        arms={subject: arm(SUBJECT), other: arm(OTHER_WORD)},
        main=Beats(subject, other, on=on, by=0.2),
        also=[AtLeast(subject, 0.9, on=on)],
        seeds=3,
        note=f"Residual stream at each of the {len(WORDS)} positions after {len(stream)} of the blocks; the seed draws "
        "the countries and the noise.",
    )
    lab.points(on, name="corruptions", title="Agreement with token replacement")
    return verdict


@paper.claim(
    "A window of neighbouring layers restores more than its layers do one by one",
    paper="Zhang & Nanda, section 5: sliding windows of MLP layers inflate the peak, beyond the sum of single patches",
    control="the sum of the effects of the window's single layers",
    reach="real",
)
def windows_inflate(lab: Lab) -> Verdict:
    """Denoise SmolLM2's feed-forward layers at the subject, one at a time and five at a time, under Gaussian noise."""
    model = smollm2(lab, smoke_depth=6)
    fed = [f"blocks.{index}.feedforward" for index in range(len(model.blocks))]

    @cache
    def swept(seed: int) -> tuple[Tensor, Tensor]:
        clean, _, answer, against = _capital_pairs(lab, model, seed)
        noise = gaussian_corruption(model, [SUBJECT], seed=seed)
        patching = Patching(model, clean, logit_difference(answer, against), corruption=noise)
        single, window = (patching.by_position(fed, [SUBJECT], window=width)[:, 0] for width in (1, WINDOW))
        return single, window

    def at_the_peak(seed: int) -> dict[str, float | list[float]]:
        _, window = swept(seed)
        return {"effect at the peak": window.max().item(), "block": [float(window.argmax())]}

    def one_by_one(seed: int) -> dict[str, float | list[float]]:
        single, window = swept(seed)
        peak = int(window.argmax())
        together = single[max(0, peak - WINDOW // 2) : peak + WINDOW // 2 + 1].sum()
        return {"effect at the peak": together.item(), "block": [float(peak)]}

    window, control = "window of five", "sum of its layers"
    verdict = lab.compare(
        arms={window: at_the_peak, control: one_by_one},
        main=Beats(window, control, on="effect at the peak", by=0.05),
        seeds=3,
        note="Share of the logit difference restored, at the position of the country; the seed draws the countries and "
        "the noise.",
    )
    lab.points("effect at the peak", name="windows", title="Restored at the peak")
    return verdict


WINDOW = 5  # layers, as in Zhang & Nanda
