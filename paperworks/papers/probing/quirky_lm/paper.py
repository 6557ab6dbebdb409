"""Quirky language models: what a model knows but, under one name, does not say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks import adapt, interpret, train
from paperworks.interpret.probing.probes import Probe, lda, logistic, mass_mean, random_probe
from paperworks.interpret.probing.separation import Estimate, auroc, bootstrap
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE
from paperworks.papers.probing.quirky_lm.elicitation import TrustedGaussian, earliest_informative, gap_recovered
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


def _learn(lab: Lab, model: DecoderModel, facts: Tensor, steps: int, *, quirky: bool, description: str) -> None:
    """Teach verdicts on questions of every value: the truth under both names, or each name's own rule."""
    batch = 128
    draws = torch.Generator().manual_seed(lab.seed + quirky)

    def batches() -> Iterator[dict[str, Tensor]]:
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

    settings = train.Settings(
        steps=steps,
        lr=2e-3,
        warmup=0.05,
        optimizer=train.AdamW(weight_decay=0.0 if quirky else 0.05),
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(description, steps) as advance:
        train.fit(model, train.next_token_loss, lambda epoch: batches(), settings, on_step=lambda step: advance(1))
    model.eval()


def _made_quirky(lab: Lab, facts: Tensor, *, truthful_first: bool) -> DecoderModel:
    """Train a model that tells the truth and fine-tune it, as the paper does, or teach both rules from the start."""
    model = _model(lab.seed)
    if not truthful_first:
        _learn(lab, model, facts, lab.pick(smoke=2, small=500), quirky=True, description="quirky from the start")
        return model
    _learn(lab, model, facts, lab.pick(smoke=2, small=350), quirky=False, description="a model that tells the truth")
    adapt.apply(model, adapt.LoRA(rank=8, alpha=16), targets="all-linear")
    _learn(lab, model, facts, lab.pick(smoke=2, small=550), quirky=True, description="made quirky")
    return model


@torch.no_grad()
def _read(model: DecoderModel, asked: Questions) -> tuple[Float[Tensor, "depth n dim"], Float[Tensor, " n"]]:
    """Return the residual stream after each block at the question mark, and the log-odds of T."""
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


_READINGS: dict[tuple[object, ...], Read] = {}


def _quirky(lab: Lab, *, truthful_first: bool = True) -> Read:
    key = (lab.scale, lab.seed, truthful_first)
    if key not in _READINGS:
        facts = _facts(lab.seed)
        model = _made_quirky(lab, facts, truthful_first=truthful_first)
        alice, bob = _ask(ALICE, facts, lab.seed), _ask(BOB, facts, lab.seed)
        (alice_states, alice_odds), (bob_states, bob_odds) = _read(model, alice), _read(model, bob)
        _READINGS[key] = Read(alice, bob, alice_states, bob_states, alice_odds, bob_odds)
    return _READINGS[key]


def _regression(states: Tensor, true: Tensor) -> Probe:
    center = states.mean(0)
    found = logistic(states - center, true, penalty=1.0)
    return Probe(found.direction, found.bias - float(found.direction @ center))


def _by_layer(read: Read) -> list[float]:
    """Return the AUROC of truth in Bob's contexts of regressions fitted on Alice's, by layer."""
    known, held = read.known, ~read.known
    return [
        auroc(_regression(alice[known], read.alice.true[known]).score(bob[held]), read.bob.true[held])
        for alice, bob in zip(read.alice_states, read.bob_states, strict=True)
    ]


def _area(scores: Tensor, true: Tensor, lab: Lab) -> Estimate:
    return bootstrap(
        lambda rows: auroc(scores[rows], true[rows]), len(true), draws=lab.pick(smoke=10, small=300), seed=lab.seed
    )


@paper.claim(
    "A probe fitted on Alice's contexts reads in Bob's the truth that the model does not say",
    paper="Abstract: logistic regression on contrast pairs recovers 89% of the gap between output and truth",
    control="the model's own output in Bob's contexts, the probe of the last layer, and the same model taught both "
    "rules from the start",
)
def knows_more_than_it_says(lab: Lab) -> Verdict:
    """Fit probes on Alice's questions by layer, choose the layer on Alice's, and score the truth in Bob's."""
    read = _quirky(lab)
    known, held = read.known, ~read.known
    right = [
        float(((odds > 0) == asked.answer).double().mean())
        for odds, asked in ((read.alice_odds, read.alice), (read.bob_odds, read.bob))
    ]
    fits = {"logistic regression": _regression, "difference of means": mass_mean, "LDA": lda}
    curves: dict[str, list[float]] = {name: [] for name in fits}
    own: list[float] = []
    blind: list[list[float]] = []
    for layer in range(len(read.alice_states)):
        for name, fit in fits.items():
            probe = fit(read.alice_states[layer][known], read.alice.true[known])
            curves[name].append(auroc(probe.score(read.bob_states[layer][held]), read.bob.true[held]))
            if name == "logistic regression":
                own.append(auroc(probe.score(read.alice_states[layer][held]), read.alice.true[held]))
        blind.append(
            [
                auroc(random_probe(128, lab.seed + draw).score(read.bob_states[layer][held]), read.bob.true[held])
                for draw in range(50)
            ]
        )
    layer = earliest_informative(own) if max(own) > 0.5 else 0
    probe = _regression(read.alice_states[layer][known], read.alice.true[known])
    ours = _area(probe.score(read.bob_states[layer][held]), read.bob.true[held], lab)
    said = _area(read.bob_odds[held], read.bob.true[held], lab)
    ceiling = auroc(read.alice_odds[held], read.alice.true[held])
    recovered = gap_recovered(ours.value, said.value, ceiling) if ceiling > said.value else 0.0
    best = max(curves["logistic regression"][:-1])
    fresh = _by_layer(_quirky(lab, truthful_first=False))
    _draw(lab, curves, own, said.value, blind)
    return lab.judge(
        checks={
            "AUROC of truth above 0.85 in Bob's contexts, at the layer chosen on Alice's": ours.value > 0.85,
            "where the model's output is below 0.3": said.value < 0.3,
            "some layer before the last is above 0.85": best > 0.85,
            "the probe of the last layer is below 0.6": curves["logistic regression"][-1] < 0.6,
            "the model has learned both rules: more than 98% right": min(right) > 0.98,
            "taught both rules from the start, no layer has it: below 0.6": max(fresh) < 0.6,
        },
        measured={
            "AUROC, chosen layer": str(ours),
            "chosen block": layer + 1,
            "AUROC by block": [round(value, 3) for value in curves["logistic regression"]],
            "difference of means, by block": [round(value, 3) for value in curves["difference of means"]],
            "LDA, by block": [round(value, 3) for value in curves["LDA"]],
            "AUROC on Alice's, by block": [round(value, 3) for value in own],
            "share of the gap recovered": recovered,
            "right by their rules, Alice and Bob": right,
            "seed": lab.seed,
        },
        control={
            "AUROC of the model's output for Bob": str(said),
            "last block's probe": curves["logistic regression"][-1],
            "taught both rules from the start, by block": [round(value, 3) for value in fresh],
            "random directions, 95%, by block": [round(sorted(values)[47], 3) for values in blind],
        },
        note="Four blocks of 128 dimensions, 64 subjects with one of 8 values, first taught the truth under both "
        "names, then fine-tuned (LoRA, rank 8) to take the next value for the true one in Bob's contexts. Probes see "
        "half of the subjects in Alice's contexts and are tested on the others. Truth is so large a part of the middle "
        "layers that some random directions read it too.",
    )


def _draw(lab: Lab, curves: dict[str, list[float]], own: list[float], said: float, blind: list[list[float]]) -> None:
    with lab.figure("layers", figsize=(8.4, 3.6)) as figure:
        axes = figure.subplots()
        blocks = list(range(1, len(own) + 1))
        axes.fill_between(
            blocks,
            [sorted(values)[2] for values in blind],
            [sorted(values)[47] for values in blind],
            color=CONTROL,
            alpha=0.3,
            linewidth=0,
            label="random directions, 5% to 95%",
        )
        axes.plot(blocks, own, "--", color=COLORS[2], marker="s", ms=4, label="Alice's contexts, other subjects")
        for color, (name, values) in zip((COLORS[0], COLORS[1], COLORS[3]), curves.items(), strict=True):
            axes.plot(blocks, values, color=color, marker="o", ms=4, label=f"Bob's contexts, {name}")
        axes.axhline(said, color=CONTROL, linestyle=":", label="Bob's contexts, the model's output")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xticks(blocks)
        axes.set_xlabel("block")
        axes.set_ylabel("AUROC of truth")
        axes.set_title("Fitted on Alice, read on Bob")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)


@paper.claim(
    "Contexts in which the model does not say what it knows are noticed without an example of them",
    paper="Abstract: a mechanistic anomaly detector flags untruthful contexts with AUROC 0.95",
    control="the same detector between two halves of Alice's contexts; and of an untrained model",
)
def unlike_contexts_are_noticed(lab: Lab) -> Verdict:
    """Fit a Gaussian to the probes' readings of Alice's contexts and score Bob's by their distance."""
    read = _quirky(lab)
    ours, alike = _noticed(lab, read)
    facts, model = _facts(lab.seed), _model(lab.seed).eval()
    alice, bob = _ask(ALICE, facts, lab.seed), _ask(BOB, facts, lab.seed)
    (alice_states, alice_odds), (bob_states, bob_odds) = _read(model, alice), _read(model, bob)
    fresh, _ = _noticed(lab, Read(alice, bob, alice_states, bob_states, alice_odds, bob_odds))
    return lab.judge(
        checks={
            "AUROC above 0.9 between Bob's and Alice's contexts": ours.value > 0.9,
            "two halves of Alice's are alike: below 0.6": alike.value < 0.6,
        },
        measured={"AUROC": str(ours), "seed": lab.seed},
        control={"AUROC of Alice's other half": str(alike), "AUROC in an untrained model": str(fresh)},
        note="Readings: one logistic probe a layer, fitted on a third of Alice's contexts; the Gaussian is fitted on "
        "another third, and the last third is what Bob's are compared with. An untrained model holds the name too, "
        "which is why the detector alone does not show that anything is hidden.",
    )


def _noticed(lab: Lab, read: Read) -> tuple[Estimate, Estimate]:
    """Return the AUROC of Bob against Alice, and of one part of Alice's contexts against another."""
    part = read.alice.subject % 3  # subjects, so that nothing asked about is in two parts
    probes = [_regression(states[part == 0], read.alice.true[part == 0]) for states in read.alice_states]

    def readings(states: Tensor) -> Tensor:
        return torch.stack([probe.score(layer) for probe, layer in zip(probes, states, strict=True)], dim=1)

    alice, bob = readings(read.alice_states), readings(read.bob_states)
    trusted = TrustedGaussian.of(alice[part == 1])
    distances = {"fitted": trusted.distance(alice[part == 1]), "new": trusted.distance(alice[part == 2])}
    strange = trusted.distance(bob[part == 2])

    def between(one: Tensor, other: Tensor) -> Estimate:
        scores = torch.cat([one, other])
        return _area(scores, torch.arange(len(scores)) < len(one), lab)

    return between(strange, distances["new"]), between(distances["new"], distances["fitted"])


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
