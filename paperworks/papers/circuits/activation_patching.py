"""Activation patching: which part of a run is enough for an answer, and which is needed."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.circuits.patching import (
    Patching,
    Site,
    answer_probability,
    gaussian_corruption,
    kl_divergence,
    logit_difference,
)
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import INK
from paperworks.testbeds import induction_model as small
from paperworks.testbeds.capitals import LAST, OTHER_WORD, SUBJECT, WORDS, capital_pairs
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
    """Sweep all heads and positions of the hand-set model, then all heads of a trained one."""
    model = small.hand_set(noise=0.05)
    clean, corrupted, answer, against = small.induction_pairs(lab, small.HAND_VOCAB)
    metric = logit_difference(answer, against)
    patching = Patching(model, clean, metric, corrupted)
    paths = [f"blocks.{layer}.mixer.heads" for layer in (0, 1)]
    sites = [Site(path, position, head) for path in paths for head in (0, 1) for position in range(clean.shape[1])]
    effects = patching.sweep([[site] for site in sites]).view(4, -1)
    other = Patching(model, clean, metric, corrupted, value="resample").sweep([[site] for site in sites]).view(4, -1)
    circuit = effects[0, 2].item(), effects[2, -1].item()
    rest = effects.clone()
    rest[0, 2] = rest[2, -1] = 0.0
    trained = small.induction_model(lab)
    columns = range(clean.shape[1]) if lab.scale != "smoke" else range(8, 10)
    t_clean, t_corrupted, t_answer, t_against = small.induction_pairs(lab, small.VOCAB)
    learned = Patching(trained, t_clean, logit_difference(t_answer, t_against), t_corrupted)
    found = torch.stack(
        [
            torch.cat([learned.by_head([path], small.HEADS, position=position) for path in paths]).flatten()
            for position in columns
        ],
        1,
    )
    together = learned.effect([Site("blocks.1.mixer", -1)])
    _draw_circuit(lab, effects, found)
    return lab.judge(
        checks={
            "above 0.8 at head 0.0 on B and head 1.0 on the last A": min(circuit) > 0.8,
            "below 0.2 at every other head and position": rest.abs().max() < 0.2,
            "values of another sequence restore less than 0.2 anywhere": other.max() < 0.2,
            "trained model: the second layer's heads on the last A restore more than 0.8 together": together > 0.8,
        },
        measured={
            "head 0.0 on B, head 1.0 on the last A": list(circuit),
            "largest elsewhere": rest.abs().max(),
            "logit difference, clean and corrupted": [patching.clean_score, patching.corrupted_score],
            "trained: first-layer heads on B": found[:4, 2 if len(columns) > 2 else 0],
            "trained: second-layer heads on the last A": found[4:, -1],
            "trained: those four together": together,
        },
        control={"largest effect of another sequence's values": other.max()},
    )


def _draw_circuit(lab: Lab, planted: Tensor, trained: Tensor) -> None:
    words = ["start", "A", "B", "·", "·", "C", "D", "·", "·", "A"]
    with lab.figure("circuit", figsize=(8.6, 3.6)) as figure:
        axes = figure.subplots(1, 2, width_ratios=(1, 1))
        for place, values, heads, title in (
            (axes[0], planted, 2, "Set by hand: two heads"),
            (axes[1], trained, small.HEADS, "Trained: work is shared"),
        ):
            image = place.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            place.set_yticks(range(2 * heads), [f"head {layer}.{head}" for layer in (0, 1) for head in range(heads)])
            place.set_xticks(range(len(words)), words)
            place.grid(False)
            place.set_title(title)
            place.set_xlabel("position patched")
        figure.colorbar(image, ax=axes, label="share of the answer restored", fraction=0.03)


@paper.claim(
    "A probability hides the heads that work against the answer; logit difference and KL show them",
    paper="Sections 4.1 to 4.3 (and Zhang & Nanda, section 4): probabilities cannot fall below 0 and miss negative "
    "heads; logit difference is recommended",
    control="the same runs, judged by the probability of the answer",
)
def probability_hides_negative_heads(lab: Lab) -> Verdict:
    """Denoise each of SmolLM2's 270 heads on capitals of countries, and judge every run by three metrics."""
    model = smollm2(lab, smoke_depth=2)
    clean, corrupted, answer, against = capital_pairs(lab, model)
    with torch.no_grad():
        reference = model(clean)
    metrics = {
        "logit difference": logit_difference(answer, against),
        "KL to the clean run": kl_divergence(reference),
        "probability": answer_probability(answer),
    }
    # One sweep serves all three: the first metric's call notes what the others say of the same logits.
    noted: dict[str, list[float]] = {name: [] for name in metrics}

    def note(logits: Tensor) -> Tensor:
        for name, metric in metrics.items():
            noted[name].append(metric(logits).double().mean().item())
        return metrics["logit difference"](logits)

    patching = Patching(model, clean, note, corrupted)
    paths = [f"blocks.{index}.mixer.heads" for index in range(len(model.blocks))]
    attention: Any = model.blocks[0].mixer
    heads = attention.spec.heads
    with lab.progress("270 heads", len(paths) * heads) as advance:
        patching.by_head(paths, heads, on_each=lambda: advance(1))
    effects = {}
    for name, scores in noted.items():
        start, end = scores[1], scores[0]  # corrupted and clean; the runs follow
        effects[name] = ((torch.tensor(scores[2:]) - start) / (end - start)).view(len(paths), heads)
    lowest = {name: values.min().item() for name, values in effects.items()}
    layer, head = divmod(int(effects["logit difference"].argmin()), heads)
    best_layer, best_head = divmod(int(effects["logit difference"].argmax()), heads)
    _draw_metrics(lab, effects)
    return lab.judge(
        checks={
            "the most negative head is below -0.1 by logit difference": lowest["logit difference"] < -0.1,
            "and by KL": lowest["KL to the clean run"] < -0.1,
            "by probability no head is below -0.02": lowest["probability"] > -0.02,
        },
        measured={
            "most negative head": f"{layer}.{head}",
            "its effect by logit difference": lowest["logit difference"],
            "its effect by KL": effects["KL to the clean run"][layer, head],
            "most positive head": f"{best_layer}.{best_head}",
            "effects of that head, in the order of the metrics": [
                values[best_layer, best_head].item() for values in effects.values()
            ],
            "logit difference, clean and corrupted": [noted["logit difference"][0], noted["logit difference"][1]],
            "heads below -0.02": {name: int((values < -0.02).sum()) for name, values in effects.items()}[
                "logit difference"
            ],
        },
        control={
            "effect of that head by probability": effects["probability"][layer, head],
            "lowest of any head": lowest["probability"],
            "heads below -0.02": int((effects["probability"] < -0.02).sum()),
        },
        note=f"{len(clean)} prompts 'The capital of X is the city of', corrupted by another country (symmetric token "
        "replacement).",
    )


def _draw_metrics(lab: Lab, effects: dict[str, Tensor]) -> None:
    with lab.figure("metrics", figsize=(9.2, 3.6)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for place, (name, values) in zip(axes, effects.items(), strict=True):
            image = place.imshow(values.numpy(), cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect="auto", rasterized=True)
            place.set_title(name)
            place.set_xlabel("head")
            place.set_xticks(range(values.shape[1]))
            place.grid(False)
        axes[0].set_ylabel("block")
        figure.colorbar(image, ax=axes, label="share restored (clipped at 0.5)", fraction=0.03)


@paper.claim(
    "Token replacement and Gaussian noise on the subject trace the answer to the same places",
    paper="Section 2 and Zhang & Nanda, section 3: replacing tokens is preferred, Gaussian noise of three standard "
    "deviations can give other results",
    control="the same noise on another word of the prompt",
)
def corruptions_agree(lab: Lab) -> Verdict:
    """Trace where SmolLM2 keeps the country under three corruptions, and correlate the maps."""
    model = smollm2(lab, smoke_depth=6)
    clean, corrupted, answer, against = capital_pairs(lab, model)
    metric = logit_difference(answer, against)
    corruptions = {
        "another country": Patching(model, clean, metric, corrupted),
        "noise on the country": Patching(
            model, clean, metric, corruption=gaussian_corruption(model, [SUBJECT], seed=lab.seed)
        ),
        "noise on 'city'": Patching(
            model, clean, metric, corruption=gaussian_corruption(model, [OTHER_WORD], seed=lab.seed)
        ),
    }
    layers = lab.pick(smoke=(0, 5), small=(0, 8, 16, 20, 22, 23, 26, 29))
    stream = [f"blocks.{index}" for index in layers]
    traces = {}
    with lab.progress("residual stream", len(corruptions) * len(stream) * 8) as advance:
        for name, patching in corruptions.items():
            traces[name] = patching.by_position(stream, range(8), on_each=lambda: advance(1))
    flat = torch.stack([values.flatten() for values in traces.values()])
    agreement = torch.corrcoef(flat)[0]
    _draw_traces(lab, traces, layers)
    return lab.judge(
        checks={
            "both corruptions of the country give one map (correlation above 0.9)": agreement[1] > 0.9,
            "noise on another word gives another (below 0.7)": agreement[2] < 0.7,
        },
        measured={
            "correlation": agreement[1],
            "logit difference: clean, another country, noise": [
                corruptions["another country"].clean_score,
                corruptions["another country"].corrupted_score,
                corruptions["noise on the country"].corrupted_score,
            ],
        },
        control={
            "correlation with noise on 'city'": agreement[2],
            "logit difference under that noise": corruptions["noise on 'city'"].corrupted_score,
        },
    )


@paper.claim(
    "A window of neighbouring layers restores more than its layers do one by one",
    paper="Zhang & Nanda, section 5: sliding windows of MLP layers inflate the peak, beyond the sum of single patches",
    control="the sum of the effects of the window's single layers",
)
def windows_inflate(lab: Lab) -> Verdict:
    """Denoise SmolLM2's feed-forward layers at the last position, one at a time and five at a time."""
    model = smollm2(lab, smoke_depth=6)
    clean, corrupted, answer, against = capital_pairs(lab, model)
    patching = Patching(model, clean, logit_difference(answer, against), corrupted)
    fed = [f"blocks.{index}.feedforward" for index in range(len(model.blocks))]
    with lab.progress("feed-forward layers", 2 * len(fed)) as advance:
        single = patching.by_position(fed, [LAST], on_each=lambda: advance(1))[:, 0]
        window = patching.by_position(fed, [LAST], window=5, on_each=lambda: advance(1))[:, 0]
    peak = int(window.argmax())
    together = single[max(0, peak - 2) : peak + 3].sum()
    return lab.judge(
        checks={
            "the best window restores more than its layers one by one add up to": window[peak] > together,
            "and more than the best single layer": window[peak] > single.max(),
        },
        measured={"best window, centred on block": peak, "its effect": window[peak]},
        control={"sum of its five layers": together, "best single layer": single.max()},
        note="At the last position these layers add to the logits side by side, and later ones answer for missing "
        "earlier ones, so five together do a little less than the sum of each alone. The paper's inflation is of "
        "GPT-2 XL at the subject's position.",
    )


def _draw_traces(lab: Lab, traces: dict[str, Tensor], layers: tuple[int, ...]) -> None:
    with lab.figure("trace", figsize=(9.6, 3.4)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for place, (name, values) in zip(axes, traces.items(), strict=True):
            image = place.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", rasterized=True)
            place.set_xticks(range(len(WORDS)), WORDS, rotation=60, color=INK)
            place.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            place.grid(False)
            place.set_title(name)
        axes[0].set_ylabel("after block")
        figure.colorbar(image, ax=axes, label="share of the answer restored", fraction=0.03)
