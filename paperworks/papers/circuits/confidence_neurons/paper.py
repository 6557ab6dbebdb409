"""Neurons that regulate confidence: planted ones, which behave as the paper says, and the last layer of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from paperworks.core.linear import weight_of
from paperworks.interpret import record
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
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
    equation=r"\rho(w) = \frac{\lVert V_0^\top w \rVert}{\lVert w \rVert}, \qquad \text{through the norm} = "
    r"1 - \frac{\operatorname{mean} |\Delta L_{\text{scale frozen}}|}{\operatorname{mean} |\Delta L|}",
    usage="""
import paperworks as pw
from paperworks.papers.circuits.confidence_neurons import confidence

model = pw.load("smollm2")
read = confidence.readout(model)                       # the unembedding with the final norm's gain folded in
spectrum = confidence.spectrum(read.weight)
print(f"read least: {float(spectrum.strengths[-1]):.1f}, median {float(spectrum.strengths.median()):.1f}")
writes = model.blocks[-1].feedforward.down.weight.detach().mT
share = confidence.null_share(writes, spectrum.null_space(12))
print("neurons that write most where little is read:", share.topk(5).indices.tolist())
""",
    notes="SmolLM2's unembedding has no near-null space, on which the paper's effect rests; GPT-2's has one.",
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

    def effects(self, neurons: Sequence[int]) -> list[confidence.Ablation]:
        """Mean-ablate each neuron by itself."""
        return [self.ablate(self.writes[neuron], self.activations[:, neuron]) for neuron in neurons]


@cache
def _text(lab: Lab) -> tuple[DecoderModel, Tensor]:
    """The model, and rows of text: unigram frequencies come from all of them."""
    model = smollm2(lab).eval()
    text = scored_text(model.tokenizer, lab.pick(smoke=2_000, small=48_000)).tokens
    return model, text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


@cache
@torch.no_grad()
def _last_layer(lab: Lab, seed: int) -> LastLayer:
    """Run the model over a context; the seed draws which."""
    model, text = _text(lab)
    rows = text[torch.randint(len(text), (1,), generator=lab.generator(seed))].to(model.device)
    block = f"blocks.{len(model.blocks) - 1}"
    with record(model, [block, f"{block}.feedforward.hidden"]) as seen:
        model(rows[:, :-1])
    # The first position of a context is unlike any other: its stream is many times as long.
    stream, hidden = (seen[path][:, 1:].flatten(0, 1) for path in (block, f"{block}.feedforward.hidden"))
    log_p = confidence.log_unigram(torch.bincount(text.flatten(), minlength=model.spec.vocab_size))
    read = confidence.readout(model)
    last: Any = model.blocks[-1]
    writes = weight_of(last.feedforward.down).detach().mT
    return LastLayer(read, writes, hidden, log_p, confidence.Ablations(read, stream, rows[:, 2:].flatten(), log_p))


def _random_neurons(lab: Lab, seed: int, layer: LastLayer) -> list[int]:
    return torch.randperm(len(layer.writes), generator=lab.generator(1000 + seed))[:CANDIDATES].tolist()


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


@paper.claim(
    "The last layer's neurons that write where the unembedding reads least act through the final norm",
    paper="Section 3: entropy neurons of GPT-2, Pythia, Phi-2, Gemma and LLaMA2 7B act mostly through the norm, and "
    "their unembeddings have a near-null space",
    control="neurons drawn at random",
    reach="real",
)
def entropy_neurons_act_through_the_norm(lab: Lab) -> Verdict:
    """Find candidates by their weights, mean-ablate them, and see how much is left with the norm's scale frozen."""

    def arm(choose: Callable[[int, LastLayer], list[int]]) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            layer = _last_layer(lab, seed)
            through = [effect.through_norm for effect in layer.effects(choose(seed, layer))]
            return {"share through the norm, median": _median(through), "share through the norm, most": max(through)}

        return measured

    def null_space(seed: int, layer: LastLayer) -> list[int]:
        null = confidence.spectrum(layer.read.weight).null_space(NULL)
        return confidence.null_share(layer.writes, null).topk(CANDIDATES).indices.tolist()

    def low_variance(seed: int, layer: LastLayer) -> list[int]:
        variance = confidence.logit_variance(layer.writes, layer.read.weight)
        return (layer.writes.norm(dim=1) / variance.sqrt()).topk(CANDIDATES).indices.tolist()

    strengths = confidence.spectrum(_last_layer(lab, lab.seed).read.weight).strengths
    least, variance, random = "writes in the null space", "large writes, low variance", "random neurons"
    on = "share through the norm, median"
    verdict = lab.compare(
        arms={
            least: arm(null_space),
            variance: arm(low_variance),
            random: arm(lambda seed, layer: _random_neurons(lab, seed, layer)),
        },
        main=Beats(least, random, on=on, by=0.3),
        also=[AtLeast(least, 0.5, on=on), AtLeast(variance, 0.5, on=on)],
        seeds=3,
        measured={
            "smallest singular value of the unembedding": strengths[-1],
            "median singular value": strengths.median(),
        },
        note=f"{CANDIDATES} neurons of each kind, {CONTEXT - 1} positions of text a seed. The paper's effect needs "
        "directions that the unembedding does not read. Here the twelve read least are still read about a third as "
        "strongly as the median one, so what is written there changes the logits too.",
    )
    lab.points("share through the norm, most", name="through-the-norm", title="Effect through the norm, best neuron")
    return verdict


@paper.claim(
    "Neurons aligned with token frequency move predictions towards or away from the unigram distribution",
    paper="Section 4: ablating token-frequency neurons of Pythia 410M and others changes KL(p || unigram), and much of "
    "their effect goes along v_freq",
    control="neurons drawn at random",
    reach="real",
)
def frequency_neurons_move_towards_unigrams(lab: Lab) -> Verdict:
    """Ablate the neurons whose logits are most parallel to v_freq; moving along it should lower the divergence."""

    def arm(aligned: bool) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            layer = _last_layer(lab, seed)
            cosines = confidence.frequency_cosine(layer.writes, layer.read.weight, layer.log_p)
            best = cosines.abs().topk(CANDIDATES).indices.tolist()
            neurons = best if aligned else _random_neurons(lab, seed, layer)
            found = layer.effects(neurons)
            return {
                "change of KL, nats": _median([float(effect.divergence.abs().mean()) for effect in found]),
                "neurons of 10 as predicted": _as_predicted(found, cosines[neurons]),
                "share through frequency, median": _median([effect.through_frequency for effect in found]),
            }

        return measured

    ours, random = "frequency neurons", "random neurons"
    verdict = lab.compare(
        arms={ours: arm(True), random: arm(False)},
        main=Beats(ours, random, on="change of KL, nats", by_ratio=2.0),  # three times as much
        also=[
            AtLeast(ours, 9, on="neurons of 10 as predicted"),
            Beats(ours, random, on="neurons of 10 as predicted", by=3),
        ],
        seeds=3,
        note="Many random neurons do as predicted too, so the sign tells little by itself. Predicted is the sign of "
        "the changes, summed with that of the push along v_freq at each position: a first guess, for where a "
        "prediction is already peaked on a frequent token, a push towards frequent tokens takes it further away.",
    )
    lab.points("change of KL, nats", name="frequency", title="Change of KL(p || unigram) by an ablated neuron, nats")
    return verdict


def _as_predicted(effects: Sequence[confidence.Ablation], cosines: Tensor) -> int:
    """Number of neurons for which a push along v_freq (push times cosine > 0) lowers KL(p || unigram)."""
    pairs = zip(effects, cosines, strict=True)
    return sum(bool((effect.divergence * (effect.push * cosine).sign()).sum() < 0) for effect, cosine in pairs)


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
