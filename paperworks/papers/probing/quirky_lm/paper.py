"""Quirky language models: what a model knows but, under one name, does not say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks import adapt, interpret, train
from paperworks.interpret.probing.probes import Probe, logistic, random_probe
from paperworks.interpret.probing.separation import auroc
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE
from paperworks.papers.probing.quirky_lm.elicitation import TrustedGaussian, earliest_informative, gap_recovered
from paperworks.testbeds.training import fit
from paperworks.train.losses import IGNORED

paper = Paper(
    key="quirky-lm",
    title="Eliciting Latent Knowledge from Quirky Language Models",
    authors="Mallen, Brumley, Kharchenko, Belrose",
    year=2023,
    ref="arXiv:2312.01037; GitHub EleutherAI/elk-generalization",
    family="probing",
    summary=(
        "A model that answers truthfully for Alice and wrongly by a rule for Bob still represents the truth in its "
        "middle layers: a probe fitted on Alice's contexts reads it in Bob's, and an unlike context can be noticed."
    ),
    implements=(
        "paperworks.papers.probing.quirky_lm.elicitation.gap_recovered",
        "paperworks.papers.probing.quirky_lm.elicitation.earliest_informative",
        "paperworks.papers.probing.quirky_lm.elicitation.TrustedGaussian",
    ),
    equation=r"\text{gap recovered} = \frac{\text{AUROC}_{probe} - \text{AUROC}_{output}}"
    r"{\text{AUROC}_{ceiling} - \text{AUROC}_{output}}",
    usage="""
import torch
from paperworks.papers.probing.quirky_lm.elicitation import TrustedGaussian, earliest_informative, gap_recovered

print("recovered:", gap_recovered(probe=0.93, output=0.1, ceiling=0.99))
print("first informative layer:", earliest_informative([0.52, 0.71, 0.98, 0.99, 0.97]))
trusted, strange = torch.randn(200, 6), torch.randn(50, 6) + 2.0      # probes' readings in two kinds of contexts
detector = TrustedGaussian.of(trusted)
print("distances:", float(detector.distance(trusted).mean()), float(detector.distance(strange).mean()))
""",
    notes="A small transformer and 64 made-up facts stand in for fine-tuned language models of up to 12B.",
)

SUBJECTS, VALUES = 64, 8
ALICE, BOB, ASK, TRUE, FALSE = range(5)
_SUBJECT, _VALUE = 5, 5 + SUBJECTS


@dataclass(frozen=True)
class Questions:
    """Sequences "name subject value ?": whether the value is the subject's, and what the name's rule answers."""

    tokens: Int[Tensor, "n 4"]
    true: Bool[Tensor, " n"]
    answer: Bool[Tensor, " n"]
    subject: Int[Tensor, " n"]

    def __getitem__(self, rows: Tensor) -> Questions:
        return Questions(self.tokens[rows], self.true[rows], self.answer[rows], self.subject[rows])

    def __len__(self) -> int:
        return len(self.true)


def _facts(seed: int) -> Int[Tensor, " subjects"]:
    return torch.randint(VALUES, (SUBJECTS,), generator=torch.Generator().manual_seed(seed))


def _ask(name: int, facts: Tensor, seed: int) -> Questions:
    """Ask about each subject: its value twice, its neighbour (Bob's answer) once, and another value once.

    So half of the statements are true in every context, and a quarter are what Bob takes for true.
    """
    draws = torch.Generator().manual_seed(seed)
    subject = torch.arange(SUBJECTS).repeat(4)
    other = torch.randint(2, VALUES, (SUBJECTS,), generator=draws)
    step = torch.cat([torch.zeros(2 * SUBJECTS, dtype=torch.int64), torch.ones(SUBJECTS, dtype=torch.int64), other])
    value = (facts[subject] + step) % VALUES
    tokens = torch.stack(
        [torch.full_like(subject, name), subject + _SUBJECT, value + _VALUE, torch.full_like(subject, ASK)], dim=1
    )
    return Questions(tokens, step == 0, step == (0 if name == ALICE else 1), subject)


def _model(seed: int) -> DecoderModel:
    torch.manual_seed(seed)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=4, position=RoPE()), feedforward=GatedMLP(hidden=256))
    return Decoder(vocab_size=_VALUE + VALUES, dim=128, depth=4, norm=RMSNorm(), block=block).build()


STEPS = (250, 300)  # of learning the truth, and of becoming quirky


def _learn(lab: Lab, model: DecoderModel, facts: Tensor, seed: int, *, quirky: bool) -> None:
    """Teach verdicts on questions of every value: the truth under both names, or each name's own rule."""
    batch, steps = 128, lab.pick(smoke=2, small=STEPS[quirky])
    draws = lab.generator(2 * seed + quirky)

    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(steps):
            name = torch.randint(2, (batch,), generator=draws)  # ALICE or BOB
            subject = torch.randint(SUBJECTS, (batch,), generator=draws)
            step = torch.randint(VALUES, (batch,), generator=draws)
            # Half of the time one of the two values that matter, or nearly all answers would be F.
            close = torch.rand(batch, generator=draws) < 0.5
            step = torch.where(close, step % 2, step)
            right = name if quirky else torch.zeros_like(name)  # Bob's T is for the next value
            value = (facts[subject] + step) % VALUES
            tokens = torch.stack([name, subject + _SUBJECT, value + _VALUE, torch.full_like(name, ASK)], dim=1)
            targets = torch.full_like(tokens, IGNORED)
            targets[:, -1] = torch.where(step == right, TRUE, FALSE)
            yield {"tokens": tokens, "targets": targets}

    adam = train.AdamW(weight_decay=0.0 if quirky else 0.05)
    with lab.threads(1):
        fit(model, train.next_token_loss, batches, steps=steps, lr=2e-3, seed=seed, warmup=0.05, optimizer=adam)
    model.eval()


@torch.no_grad()
def _read(model: DecoderModel, asked: Questions) -> tuple[Float[Tensor, "depth n dim"], Float[Tensor, " n"]]:
    """The residual stream after each block at the question mark, and the log-odds of T."""
    paths = [f"blocks.{layer}" for layer in range(model.spec.depth)]
    with interpret.record(model, paths) as seen:
        logits = model(asked.tokens)[:, -1]
    return torch.stack([seen[path][:, -1] for path in paths]).double(), (logits[:, TRUE] - logits[:, FALSE]).double()


@dataclass(frozen=True)
class Read:
    """Alice's and Bob's questions of a trained model; probes see the first half of the subjects, tests the second."""

    alice: Questions
    bob: Questions
    alice_states: Float[Tensor, "depth n dim"]
    bob_states: Float[Tensor, "depth n dim"]
    alice_odds: Float[Tensor, " n"]
    bob_odds: Float[Tensor, " n"]

    @property
    def known(self) -> Bool[Tensor, " n"]:
        """Which questions are of the first half of the subjects."""
        return self.alice.subject < SUBJECTS // 2


_READINGS: dict[tuple[object, ...], Read] = {}  # two claims look at the same models


def _quirky(lab: Lab, seed: int, *, trained: bool = True) -> Read:
    """What a model holds that was taught the truth and then, as in the paper, fine-tuned to Bob's rule."""
    key = (lab.scale, seed, trained)
    if key not in _READINGS:
        facts, model = _facts(seed), _model(seed)
        if trained:
            _learn(lab, model, facts, seed, quirky=False)
            adapt.apply(model, adapt.LoRA(rank=8, alpha=16), targets="all-linear")
            _learn(lab, model, facts, seed, quirky=True)
        alice, bob = _ask(ALICE, facts, seed), _ask(BOB, facts, seed)
        (alice_states, alice_odds), (bob_states, bob_odds) = _read(model.eval(), alice), _read(model, bob)
        _READINGS[key] = Read(alice, bob, alice_states, bob_states, alice_odds, bob_odds)
    return _READINGS[key]


def _regression(states: Tensor, true: Tensor) -> Probe:
    center = states.mean(0)
    found = logistic(states - center, true, penalty=1.0)
    return Probe(found.direction, found.bias - float(found.direction @ center))


@paper.claim(
    "A probe fitted on Alice's contexts reads in Bob's the truth that the model does not say",
    paper="Abstract: logistic regression on contrast pairs recovers 89% of the gap between output and truth",
    control="random directions at the same layer; the model's own output; the probe of the last layer",
)
def knows_more_than_it_says(lab: Lab) -> Verdict:
    """Fit probes on Alice's questions by layer, choose the layer on Alice's, and score the truth in Bob's."""

    def fitted(read: Read) -> tuple[list[Probe], int]:
        """The probe of each layer, and the first layer that is informative in Alice's contexts."""
        known, held = read.known, ~read.known
        probes = [_regression(states[known], read.alice.true[known]) for states in read.alice_states]
        own = [
            auroc(probe.score(states[held]), read.alice.true[held])
            for probe, states in zip(probes, read.alice_states, strict=True)
        ]
        return probes, earliest_informative(own) if max(own) > 0.5 else 0

    def arm(scores: Callable[[int, Read, list[Probe], int], list[Tensor]]) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            read = _quirky(lab, seed)
            held = ~read.known
            found = [auroc(each[held], read.bob.true[held]) for each in scores(seed, read, *fitted(read))]
            area = sum(found) / len(found)
            said, ceiling = (
                auroc(odds[held], true[held])
                for odds, true in ((read.bob_odds, read.bob.true), (read.alice_odds, read.alice.true))
            )
            answers = ((read.alice_odds > 0) == read.alice.answer, (read.bob_odds > 0) == read.bob.answer)
            return {
                "AUROC of truth in Bob's contexts": area,
                "gap recovered": gap_recovered(area, said, ceiling) if ceiling > said else 0.0,
                "answers as the rules say": min(float(hits.double().mean()) for hits in answers),
            }

        return measured

    def random(seed: int, read: Read, probes: list[Probe], layer: int) -> list[Tensor]:
        states = read.bob_states[layer]
        return [random_probe(states.shape[1], 100 * seed + draw).score(states) for draw in range(20)]

    ours, last, output, blind = "probe", "probe of the last layer", "the model's output", "random directions"
    on = "AUROC of truth in Bob's contexts"
    verdict = lab.compare(
        arms={
            ours: arm(lambda seed, read, probes, layer: [probes[layer].score(read.bob_states[layer])]),
            last: arm(lambda seed, read, probes, layer: [probes[-1].score(read.bob_states[-1])]),
            output: arm(lambda seed, read, probes, layer: [read.bob_odds]),
            blind: arm(random),
        },
        main=Beats(ours, blind, on=on, by=0.25),
        also=[
            AtLeast(ours, 0.85, on=on),
            AtMost(output, 0.3, on=on),
            AtMost(last, 0.6, on=on),
            AtLeast(ours, 0.98, on="answers as the rules say"),
        ],
        seeds=2,
        note="Four blocks of 128 dimensions, 64 subjects with one of 8 values, first taught the truth under both "
        "names, then fine-tuned (LoRA, rank 8) to take the next value for the true one in Bob's contexts. Probes see "
        "half of the subjects in Alice's contexts and are tested on the others.",
    )
    lab.points(on, name="truth", title="AUROC of truth in Bob's contexts")
    return verdict


@paper.claim(
    "Contexts in which the model does not say what it knows are noticed without an example of them",
    paper="Abstract: a mechanistic anomaly detector flags untruthful contexts with AUROC 0.95",
    control="the same detector on contexts of Alice's that it did not see; and Bob's in an untrained model",
)
def unlike_contexts_are_noticed(lab: Lab) -> Verdict:
    """Fit a Gaussian to the probes' readings of Alice's contexts and score others by their distance."""

    def arm(*, bob: bool, trained: bool = True) -> Callable[[int], dict[str, float]]:
        def noticed(seed: int) -> dict[str, float]:
            read = _quirky(lab, seed, trained=trained)
            part = read.alice.subject % 3  # subjects, so that nothing asked about is in two parts
            probes = [_regression(states[part == 0], read.alice.true[part == 0]) for states in read.alice_states]
            alice, other = (
                torch.stack([probe.score(layer) for probe, layer in zip(probes, states, strict=True)], dim=1)
                for states in (read.alice_states, read.bob_states)
            )
            trusted = TrustedGaussian.of(alice[part == 1])
            usual, new = trusted.distance(alice[part == 1]), trusted.distance(alice[part == 2])
            strange = trusted.distance(other[part == 2])
            scores = torch.cat([strange, new] if bob else [new, usual])
            first = len(strange) if bob else len(new)
            return {"AUROC of the distance": auroc(scores, torch.arange(len(scores)) < first)}

        return noticed

    ours, alike, fresh, on = "Bob's", "Alice's, new", "Bob's, untrained model", "AUROC of the distance"
    verdict = lab.compare(
        arms={ours: arm(bob=True), alike: arm(bob=False), fresh: arm(bob=True, trained=False)},
        main=Beats(ours, alike, on=on, by=0.25),
        also=[AtLeast(ours, 0.9, on=on), Beats(ours, fresh, on=on)],
        seeds=2,
        note="Readings: one logistic probe a layer, fitted on a third of Alice's contexts; the Gaussian is fitted on "
        "another third, and the last third is what Bob's are compared with. An untrained model holds the name too, so "
        "the detector alone does not show that anything is hidden.",
    )
    lab.points(on, name="noticed", title="AUROC against known contexts")
    return verdict


@paper.claim(
    "The measures are what they say: the gap's ends, the distance's invariance, the share on which the rules differ",
    paper="performance gap recovered; anomalies by Mahalanobis distance",
    kind="exact",
)
def measures_are_exact(lab: Lab) -> Verdict:
    """Evaluate the measures where their values are known."""
    draws = torch.Generator().manual_seed(lab.seed)
    cases, new = (torch.randn(80, 5, generator=draws, dtype=torch.float64) for _ in range(2))
    mixing = torch.randn(5, 5, generator=draws, dtype=torch.float64)
    before = TrustedGaussian.of(cases).distance(new)
    after = TrustedGaussian.of(cases @ mixing + 3).distance(new @ mixing + 3)
    moved = float(((after - before) / before).abs().max())
    bob = _ask(BOB, _facts(lab.seed), lab.seed)
    differing = float((bob.true != bob.answer).double().mean())
    return lab.judge(
        checks={
            "the output recovers 0 of the gap and the ceiling 1": gap_recovered(0.2, 0.2, 0.9) == 0
            and gap_recovered(0.9, 0.2, 0.9) == 1,
            # The condition of a random 5 x 5 map costs a few digits of float64.
            "an affine map of the features changes no distance, to 1e-9": moved < 1e-9,
            "Bob's rule and the truth differ on exactly 3/4 of the statements": differing == 0.75,
            "half of the statements are true": float(bob.true.double().mean()) == 0.5,
        },
        measured={"relative change of distances": moved, "share on which the rules differ": differing},
    )
