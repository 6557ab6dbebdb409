"""Neurons that regulate confidence: planted ones, which behave as the paper says, and the last layer of SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from paperworks.core.linear import weight_of
from paperworks.interpret import record
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.circuits.confidence_neurons import confidence
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="confidence-neurons",
    title="Confidence Regulation Neurons in Language Models",
    authors="Stolfo, Wu, Gurnee, Belinkov, Song, Sachan, Nanda",
    year=2024,
    ref="arXiv:2406.16254",
    family="circuits",
    summary=(
        "Some neurons of the last layer write where the unembedding hardly reads and set, through the final norm, how "
        "sure the model is; others move its predictions towards or away from how frequent tokens are."
    ),
    implements=(
        "paperworks.papers.circuits.confidence_neurons.confidence.readout",
        "paperworks.papers.circuits.confidence_neurons.confidence.logit_variance",
        "paperworks.papers.circuits.confidence_neurons.confidence.spectrum",
        "paperworks.papers.circuits.confidence_neurons.confidence.null_share",
        "paperworks.papers.circuits.confidence_neurons.confidence.frequency_cosine",
        "paperworks.papers.circuits.confidence_neurons.confidence.Ablations",
    ),
)

CANDIDATES = 10
NULL = 12  # directions read least: about the share of the stream that the paper takes of LLaMA2's
CONTEXT = 128


@dataclass
class LastLayer:
    """The last layer's neurons on some text: what each writes, and its activation at each position."""

    read: confidence.Readout
    writes: Float[Tensor, "neurons dim"]
    activations: Float[Tensor, "positions neurons"]
    log_p: Float[Tensor, " vocab"]
    ablate: confidence.Ablations

    def effects(self, lab: Lab, neurons: Sequence[int], name: str) -> list[confidence.Ablation]:
        """Mean-ablate each neuron by itself."""
        return [
            self.ablate(self.writes[neuron], self.activations[:, neuron])
            for neuron in lab.track(neurons, f"ablating {name}")
        ]


@torch.no_grad()
def _last_layer(lab: Lab) -> LastLayer:
    """Run the model over a few contexts; unigram frequencies come from a longer text of the same kinds."""
    model = smollm2(lab).eval()
    contexts = lab.pick(smoke=1, small=3)
    text = scored_text(model.tokenizer, lab.pick(smoke=2_000, small=96_000)).tokens
    rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    rows = rows[torch.linspace(0, len(rows) - 1, contexts).long()]
    block = f"blocks.{len(model.blocks) - 1}"
    with record(model, [block, f"{block}.feedforward.hidden"]) as seen:
        model(rows[:, :-1])
    # the first position of a context is unlike any other: its stream is many times as long
    stream, hidden = (seen[path][:, 1:].flatten(0, 1) for path in (block, f"{block}.feedforward.hidden"))
    log_p = confidence.log_unigram(torch.bincount(text, minlength=model.spec.vocab_size))
    read = confidence.readout(model)
    last: Any = model.blocks[-1]
    writes = weight_of(last.feedforward.down).detach().mT
    return LastLayer(read, writes, hidden, log_p, confidence.Ablations(read, stream, rows[:, 2:].flatten(), log_p))


def _random_neurons(lab: Lab, layer: LastLayer) -> list[int]:
    draws = torch.Generator().manual_seed(lab.seed)
    return torch.randperm(len(layer.writes), generator=draws)[:CANDIDATES].tolist()


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


@paper.claim(
    "The last layer's neurons that write where the unembedding reads least act through the final norm",
    paper="Section 3: entropy neurons of GPT-2, Pythia, Phi-2, Gemma and LLaMA2 7B act mostly through the "
    "norm, and their unembeddings have a near-null space; for SmolLM2 measured before: none found",
    control="neurons drawn at random",
)
def entropy_neurons_act_through_the_norm(lab: Lab) -> Verdict:
    """Find candidates by their weights, mean-ablate them, and see how much is left with the norm's scale frozen."""
    layer = _last_layer(lab)
    spectrum = confidence.spectrum(layer.read.weight)
    share = confidence.null_share(layer.writes, spectrum.null_space(NULL))
    variance = confidence.logit_variance(layer.writes, layer.read.weight)
    by_share = share.topk(CANDIDATES).indices.tolist()
    by_variance = (layer.writes.norm(dim=1) / variance.sqrt()).topk(CANDIDATES).indices.tolist()
    chosen = {"null space": by_share, "low variance": by_variance, "random": _random_neurons(lab, layer)}
    found = {name: layer.effects(lab, neurons, f"neurons: {name}") for name, neurons in chosen.items()}
    through = {name: [effect.through_norm for effect in effects] for name, effects in found.items()}
    _draw_through(lab, through)
    lab.table(
        "Neurons by what they write where the unembedding reads least",
        ["neuron", "share in the null space", "logit variance", "through the norm", "mean change of entropy, absolute"],
        [
            [neuron, share[neuron].item(), variance[neuron].item(), effect.through_norm, effect.entropy.abs().mean()]
            for neuron, effect in zip(by_share, found["null space"], strict=True)
        ],
    )
    strengths = spectrum.strengths
    return lab.judge(
        checks={
            "of the ten with the largest share in the null space, half act to 50% or more through the norm": (
                _median(through["null space"]) >= 0.5
            ),
            "so do half of the ten with large writes and low logit variance": _median(through["low variance"]) >= 0.5,
            "the ten with the largest share exceed the random ones, in the median and at most": (
                _median(through["null space"]) > _median(through["random"])
                and max(through["null space"]) > max(through["random"])
            ),
        },
        measured={
            "through the norm, largest share in the null space: median": _median(through["null space"]),
            "most": max(through["null space"]),
            "through the norm, large writes and low variance: median": _median(through["low variance"]),
            "most of these": max(through["low variance"]),
            "largest share of a write in the null space": share.max(),
            "smallest singular value of the unembedding": strengths[-1],
            "median singular value": strengths.median(),
            "least logit variance": variance.min(),
            "median logit variance": variance.median(),
            "positions": len(layer.activations),
        },
        control={
            "through the norm, random neurons: median": _median(through["random"]),
            "most": max(through["random"]),
        },
        note=(
            "The paper's effect needs directions that the unembedding does not read. Here the twelve read least are "
            "still read about a third as strongly as the median one, so what is written there changes the logits "
            "too: at most some neurons act through the norm in part."
        ),
    )


def _draw_through(lab: Lab, through: dict[str, list[float]]) -> None:
    names = {
        "null space": "largest share in\nthe null space",
        "low variance": "large write,\nlow variance",
        "random": "random\n(control)",
    }
    with lab.figure("through-the-norm", figsize=(6.6, 3.6)) as figure:
        axes = figure.subplots()
        for place, (name, values) in enumerate(through.items()):
            color = CONTROL if name == "random" else COLORS[place]
            spread = torch.linspace(-0.2, 0.2, len(values)).tolist()
            axes.scatter([place + each for each in spread], values, color=color, s=34)
        axes.set_xticks(range(len(through)), [names[name] for name in through])
        axes.set_ylim(min(-0.05, *(min(values) - 0.05 for values in through.values())), 1.03)
        axes.set_title("Share of a neuron's effect on the loss that goes through the final norm")


@paper.claim(
    "Neurons aligned with token frequency move predictions towards or away from the unigram distribution",
    paper="Section 4: ablating token-frequency neurons of Pythia 410M and others changes KL(p || unigram), "
    "and much of their effect goes along v_freq",
    control="neurons drawn at random",
)
def frequency_neurons_move_towards_unigrams(lab: Lab) -> Verdict:
    """Ablate the neurons whose logits are most parallel to v_freq; moving along it should lower the divergence."""
    layer = _last_layer(lab)
    cosines = confidence.frequency_cosine(layer.writes, layer.read.weight, layer.log_p)
    aligned = cosines.abs().topk(CANDIDATES).indices.tolist()
    random = _random_neurons(lab, layer)
    found = layer.effects(lab, aligned, "frequency neurons")
    others = layer.effects(lab, random, "random neurons")
    agree = _as_predicted(found, cosines[aligned])
    chance = _as_predicted(others, cosines[random])
    moved, moved_others = (
        _median([float(effect.divergence.abs().mean()) for effect in effects]) for effects in (found, others)
    )
    lab.table(
        "Neurons whose logits are most parallel to the log unigram distribution",
        ["neuron", "cosine with v_freq", "through frequency", "mean change of KL, absolute", "as predicted"],
        [
            [
                neuron,
                cosines[neuron].item(),
                effect.through_frequency,
                effect.divergence.abs().mean().item(),
                bool(_as_predicted([effect], cosines[[neuron]])),
            ]
            for neuron, effect in zip(aligned, found, strict=True)
        ],
    )
    return lab.judge(
        checks={
            "for more than 8 of 10, moving along v_freq lowers the divergence from the unigrams": agree > 8,
            "for at least 3 more than of the random neurons": agree >= chance + 3,
            "they change it at least three times as much as random neurons": moved >= 3 * moved_others,
        },
        measured={
            "of 10, as predicted": agree,
            "of 10, as predicted, positions weighted by the push": _as_predicted(
                found, cosines[aligned], weighted=True
            ),
            "positions as predicted": _positions_as_predicted(found, cosines[aligned]),
            "largest cosine with v_freq": cosines.abs().max(),
            "median cosine of all neurons": cosines.abs().median(),
            "through frequency: median": _median([effect.through_frequency for effect in found]),
            "most": max(effect.through_frequency for effect in found),
            "mean absolute change of KL in nats, median of the ten": moved,
        },
        control={
            "of 10 random neurons, as predicted": chance,
            "positions weighted by the push": _as_predicted(others, cosines[random], weighted=True),
            "positions as predicted": _positions_as_predicted(others, cosines[random]),
            "through frequency: median": _median([effect.through_frequency for effect in others]),
            "mean absolute change of KL in nats, median of the ten": moved_others,
        },
        note=(
            "Many random neurons do as predicted too, so the sign tells little by itself. Predicted is the sign of the "
            "changes, summed with that of the push along v_freq at each position: a first guess, for where a "
            "prediction is already peaked on a frequent token, a push towards frequent tokens takes it further away."
        ),
    )


def _as_predicted(effects: Sequence[confidence.Ablation], cosines: Tensor, *, weighted: bool = False) -> int:
    """Count neurons for which a push along v_freq (push times cosine > 0) lowers KL(p || unigram), over positions."""
    count = 0
    for effect, cosine in zip(effects, cosines, strict=True):
        along = effect.push * cosine
        count += bool((effect.divergence * (along if weighted else along.sign())).sum() < 0)
    return count


def _positions_as_predicted(effects: Sequence[confidence.Ablation], cosines: Tensor) -> float:
    """Return the neurons' median share of positions at which the divergence falls if the push is along v_freq."""
    pairs = zip(effects, cosines, strict=True)
    return _median([float(((e.divergence < 0) == (e.push * cosine > 0)).float().mean()) for e, cosine in pairs])


@paper.claim(
    "A planted entropy neuron scales all logits by one factor, and a planted frequency neuron is found",
    paper="Sections 3 and 4: what is written to the null space reaches the logits through the norm only, and keeps "
    "their order; W w parallel to v_freq shifts towards the unigram distribution",
    kind="exact",
)
def planted_neurons_are_exact(lab: Lab) -> Verdict:
    """Plant both in a random readout whose null space is a true one, in float64."""
    draws = torch.Generator().manual_seed(lab.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    vocab, dim, positions = 60, 24, 50
    weight = draw(vocab, dim)
    null = confidence.spectrum(weight).null_space(1)
    weight = weight - weight @ null.mT @ null
    read = confidence.Readout(weight, 1e-5)
    stream, write = draw(positions, dim), 4 * null[0]
    moved = stream + 0.8 * write
    factor = read.scale(moved) / read.scale(stream)
    clean, live = read.logits(stream), read.logits(moved)
    frozen = (read.logits(moved, read.scale(stream)) - clean).abs().max().item()
    scaled = (live - factor * clean).abs().max().item()
    shrinks = torch.equal(factor[:, 0] < 1, moved.norm(dim=1) > stream.norm(dim=1))
    targets = torch.randint(vocab, (positions,), generator=draws)
    log_p = confidence.log_unigram(torch.arange(vocab).flip(0) ** 2)
    through = confidence.Ablations(read, stream, targets, log_p)(write, draw(positions)).through_norm

    square = draw(vocab, vocab)
    planted = functional.normalize(torch.linalg.pinv(square) @ (log_p - log_p.mean()), dim=0)
    cosines = confidence.frequency_cosine(torch.cat([draw(200, vocab), planted[None]]), square, log_p).abs()
    variance = confidence.logit_variance(write[None], weight).item()
    # float64: sums of 24 products near 10
    return lab.judge(
        checks={
            "its logit variance is 0, to 1e-24": variance < 1e-24,
            "with the norm frozen the logits do not move, to 1e-11": frozen < 1e-11,
            "with the norm live all logits get one factor, to 1e-11": scaled < 1e-11,
            "their order stays": torch.equal(live.argsort(dim=1), clean.argsort(dim=1)),
            "they shrink exactly where the stream gets longer": shrinks,
            "its whole effect goes through the norm, to 1e-9": abs(through - 1) < 1e-9,
            "the planted frequency neuron is found among 200 random ones, cosine 1": (
                int(cosines.argmax()) == 200 and abs(cosines[200].item() - 1) < 1e-9
            ),
        },
        measured={
            "logit variance": variance,
            "logits moved with the norm frozen": frozen,
            "departure from one factor": scaled,
            "share through the norm": through,
            "cosine of the planted frequency neuron": cosines[200].item(),
            "largest of the random ones": cosines[:200].max().item(),
        },
    )
