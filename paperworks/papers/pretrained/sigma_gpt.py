"""Sigma-GPT: a causal transformer trained on shuffled sequences fills any gaps, many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from paperworks import train
from paperworks.generation import conditionals, fill
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import MLP, Attention, LayerNorm, PairedPositions, SinusoidalPositions, TargetPlacement
from paperworks.testbeds.markov import MarkovChain
from paperworks.testbeds.orders import AnyOrder, in_order, random_orders

paper = Paper(
    key="sigma-gpt",
    title="Sigma-GPTs: A New Approach to Autoregressive Models",
    authors="Pannatier, Courdier, Fleuret",
    year=2024,
    ref="arXiv:2404.09562",
    family="pretrained",
    summary=(
        "Each token knows where it stands and which position it is asked for, so that a causal transformer learns "
        "every order of a sequence: gaps are filled given both sides, and many tokens are drawn in a round."
    ),
    implements=(
        "paperworks.nn.PairedPositions",
        "paperworks.generation.fill",
        "paperworks.generation.conditionals",
        "paperworks.testbeds.orders.AnyOrder",
    ),
)

LENGTH = 32
CHAIN = MarkovChain(alphabet=6, successors=2, seed=2)
START = CHAIN.alphabet  # the token at position 0


def _spec(lab: Lab) -> Decoder:
    return Decoder(
        vocab_size=CHAIN.alphabet + 1,
        dim=lab.pick(smoke=16, small=64),
        depth=lab.pick(smoke=1, small=3),
        norm=LayerNorm(),
        block=Block(norm=LayerNorm(), mixer=Attention(heads=4), feedforward=MLP(hidden=lab.pick(smoke=32, small=256))),
        position=PairedPositions(length=LENGTH + 1),
        init_std=0.15,
    )


def _strings(rows: int, draws: torch.Generator) -> Tensor:
    """Return strings of the chain behind their start token."""
    return torch.nn.functional.pad(CHAIN.draw(rows, LENGTH, draws), (1, 0), value=START)


class _Strings:
    """Fresh strings, batch after batch."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed, self.epoch = steps, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which passage comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return (_strings(32, draws) for _ in range(self.steps))


def _trained(lab: Lab, name: str, fraction: float, steps: int) -> DecoderModel:
    torch.manual_seed(lab.seed)
    model = _spec(lab).build()
    table = model.position
    assert isinstance(table, torch.nn.Embedding)
    # distances are in reach from the start: from a table drawn at random they take most of the steps to learn
    waves = SinusoidalPositions(base=100.0).table(torch.arange(table.num_embeddings), table.embedding_dim)
    table.weight.data.copy_(0.3 * waves)
    settings = train.Settings(
        steps=steps,
        lr=5e-3,
        warmup=0.05,
        optimizer=train.AdamW(weight_decay=0.0),
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    batches = AnyOrder(_Strings(steps, lab.seed), fraction=fraction, seed=lab.seed)
    with lab.threads(1), lab.progress(name, steps) as advance:
        train.fit(model, train.next_token_loss, batches, settings, on_step=lambda _: advance(1))
    return model.eval()


@cache
def _puzzles(count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return held-out strings with gaps: tokens and positions known, positions wanted, exact posteriors there."""
    draws = torch.Generator().manual_seed(77)
    found = []
    for string in CHAIN.draw(count, LENGTH, draws):
        known = torch.rand(LENGTH, generator=draws) < 0.4
        known[-1] = True  # what stands behind a gap says something about it
        letters = torch.where(known, string, -1)
        places = known.nonzero()[:, 0]
        wanted = (~known).nonzero()[:, 0]
        tokens = torch.cat((torch.tensor([START]), string[places]))
        positions = torch.cat((torch.tensor([0]), places + 1))
        found.append((tokens, positions, wanted + 1, CHAIN.posterior(letters)[wanted]))
    return found


@torch.no_grad()
def _distance(model: DecoderModel, count: int) -> float:
    """Return the mean total variation between p(letter at a gap | all that is known) and the exact posterior."""
    gaps = []
    for tokens, positions, wanted, exact in _puzzles(count):
        found = conditionals(model, tokens[None], positions, wanted)[0].exp()[:, : CHAIN.alphabet]
        gaps.append((found - exact).abs().sum(1) / 2)
    return float(torch.cat(gaps).mean())


@torch.no_grad()
def _written(model: DecoderModel, count: int) -> float:
    """Return the share of strings that are valid when written from left to right, one letter at a time."""
    draws = torch.Generator().manual_seed(5)
    tokens = torch.full((count, 1), START)
    for _ in range(LENGTH):
        chances = model(tokens, last=1)[:, -1, : CHAIN.alphabet].softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=draws)), 1)
    return float(CHAIN.valid(tokens[:, 1:]).float().mean())


def _infilled(model: DecoderModel, count: int) -> float:
    """Return the share of strings that are valid once their gaps are filled."""
    right = 0
    for tokens, positions, wanted, _ in _puzzles(count):
        filled = fill(model, tokens[None], positions, wanted, seed=len(wanted)).tokens[0]
        string = torch.full((LENGTH + 1,), -1)
        string[positions], string[wanted] = tokens, filled
        right += bool((string[1:] < CHAIN.alphabet).all()) and bool(CHAIN.valid(string[None, 1:])[0])
    return right / count


@paper.claim(
    "Asked in order it is a GPT; asked for all gaps at once it answers as one at a time",
    paper="Section 2: double positional encoding; Section 3: burst sampling and token-based rejection",
    kind="exact",
    control="targets shifted by one place in the order",
)
@torch.no_grad()
def asking_is_exact(lab: Lab) -> Verdict:
    """Compare the burst with single questions and orders with a plain pass, float64, random weights."""
    torch.manual_seed(lab.seed)
    model = _spec(lab).build().double().eval()
    draws = torch.Generator().manual_seed(lab.seed)
    strings = _strings(8, draws)
    straight = in_order(strings, random_orders(8, LENGTH + 1, draws, fraction=0.0))
    shuffled = in_order(strings, random_orders(8, LENGTH + 1, draws))
    plain = model(strings[:, :-1])
    ordered = model(
        straight["tokens"],
        TargetPlacement(positions=straight["positions"], target_positions=straight["target_positions"]),
    )
    whole = model(
        shuffled["tokens"],
        TargetPlacement(positions=shuffled["positions"], target_positions=shuffled["target_positions"]),
    ).log_softmax(-1)
    known, single, burst, shifted = 10, [], [], []
    for row in range(len(strings)):
        positions = shuffled["positions"][row, :known]
        wanted = shuffled["target_positions"][row, known - 1 :]
        answers = conditionals(model, shuffled["tokens"][row : row + 1, :known], positions, wanted)[0]
        burst.append(answers)
        for place in wanted:
            asked = torch.cat((positions[1:], place[None]))[None]
            logits = model(
                shuffled["tokens"][row : row + 1, :known],
                TargetPlacement(positions=positions[None], target_positions=asked),
            )
            single.append(logits[0, -1].log_softmax(-1))
        shifted.append((answers[1:2] - answers[:1]).abs().max())
    one_by_one = float((torch.cat(burst) - torch.stack(single)).abs().max())
    first = float((torch.stack([answers[0] for answers in burst]) - whole[:, known - 1]).abs().max())
    filled = fill(model, strings[:4, :1], torch.tensor([0]), torch.arange(1, LENGTH + 1), orders=4, seed=0)
    return lab.judge(
        checks={
            "identity order equals a plain pass": torch.equal(plain, ordered),
            "burst equals one question at a time": one_by_one < 1e-12,
            "first token of an order: q equals p": first < 1e-12,
            "each round keeps at least one, all are filled": all(
                sum(kept) == LENGTH and min(kept) >= 1 for kept in filled.accepted
            ),
            "another question has another answer": float(min(shifted)) > 1e-3,
        },
        measured={"largest gap, burst": one_by_one, "largest gap, first token": first},
        control={"smallest difference, next question": float(min(shifted))},
        note=f"{len(strings)} strings of {LENGTH} letters, {known} tokens known; random weights.",
    )


@paper.claim(
    "Strings are written in a third of the calls, and gaps filled as both sides demand",
    paper="Sections 3 and 4: an order of magnitude fewer calls than tokens; conditioning on any part",
    control="the same model trained from left to right only, until it writes as well as the chain",
)
def fills_any_gaps(lab: Lab) -> Verdict:
    """Train both on strings of a Markov chain; compare gaps with exact posteriors, count rounds and valid strings."""
    sigma = _trained(lab, "random orders", 1.0, lab.pick(smoke=2, small=3200, large=40_000))
    gpt = _trained(lab, "left to right", 0.0, lab.pick(smoke=2, small=1000, large=10_000))
    samples, puzzles = lab.pick(smoke=2, small=200), lab.pick(smoke=2, small=100)
    start = torch.full((samples, 1), START)
    with lab.threads(1):
        everything = torch.arange(1, LENGTH + 1)
        filled = fill(sigma, start, torch.tensor([0]), everything, orders=8, seed=lab.seed)
        single = fill(sigma, start, torch.tensor([0]), everything, orders=1, seed=lab.seed)
        written = _written(gpt, samples)
        distances = {"any order": _distance(sigma, puzzles), "left to right": _distance(gpt, puzzles)}
        infilled = {"any order": _infilled(sigma, puzzles), "left to right": _infilled(gpt, puzzles)}
    valid = float(CHAIN.valid(filled.tokens.clamp(max=CHAIN.alphabet - 1)).float().mean())
    rounds = float(filled.rounds.float().mean())
    kept = torch.zeros(LENGTH)
    for row in filled.accepted:
        kept[: len(row)] += torch.tensor(row)
    with lab.figure("gaps", figsize=(7.6, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        string = _puzzles(puzzles)[0]
        exact = string[3]
        asked = conditionals(sigma, string[0][None], string[1], string[2])[0].exp()[:, : CHAIN.alphabet]
        blind = conditionals(gpt, string[0][None], string[1], string[2])[0].exp()[:, : CHAIN.alphabet]
        left.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        left.scatter(exact.flatten(), blind.flatten(), s=9, color=CONTROL, label="left to right")
        left.scatter(exact.flatten(), asked.flatten(), s=9, color=COLORS[0], label="any order")
        left.set_xlabel("exact probability of a letter in a gap")
        left.set_ylabel("the model's")
        left.legend(loc="upper left")
        counts = torch.bincount(filled.rounds)
        alone = torch.bincount(single.rounds, minlength=len(counts))
        right.bar(torch.arange(len(alone)), alone, color=COLORS[1], alpha=0.6, label="1 order a round")
        right.bar(torch.arange(len(counts)), counts, color=COLORS[0], alpha=0.6, label="8 orders a round")
        right.set_xlabel(f"rounds for {LENGTH} letters")
        right.set_ylabel("strings")
        right.legend()
    return lab.judge(
        checks={
            "gaps: within 0.05 total variation of the exact posterior": distances["any order"] <= 0.05,
            "the left-to-right model is at least 0.2 off": distances["left to right"] >= 0.2,
            "at least 0.9 of the strings are valid": valid >= 0.9,
            "in under a third as many rounds as letters": rounds < LENGTH / 3,
            "which writes from left to right, at least 0.9 valid": written >= 0.9,
            "filled strings valid: at least 0.5 more than left to right": infilled["any order"]
            >= infilled["left to right"] + 0.5,
        },
        measured={
            "total variation at gaps": distances["any order"],
            "valid strings": valid,
            "mean rounds, 8 orders": rounds,
            "mean rounds, 1 order": float(single.rounds.float().mean()),
            "valid strings, 1 order": float(CHAIN.valid(single.tokens.clamp(max=CHAIN.alphabet - 1)).float().mean()),
            "gaps filled, valid": infilled["any order"],
        },
        control={
            "written from left to right, valid": written,
            "total variation at gaps": distances["left to right"],
            "gaps filled, valid": infilled["left to right"],
        },
        note=f"Strings of {LENGTH} letters, {CHAIN.alphabet} kinds, {CHAIN.successors} of which may follow each; "
        f"{samples} drawn from nothing, {puzzles} held-out ones with about 60% of the letters "
        "to fill. A round is two calls. The table of positions starts from sinusoids: from random vectors 4,500 steps "
        "gave 0.075 and 0.60 valid.",
    )
