"""Induction heads: how a transformer comes to continue what it has seen before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from paperworks.interpret import edit, record
from paperworks.interpret.circuits import head_scores
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds import induction_model as small
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="induction-heads",
    title="In-context Learning and Induction Heads",
    authors="Olsson, Elhage, Nanda, Joseph, DasSarma, Henighan et al.",
    year=2022,
    ref="transformer-circuits.pub/2022/in-context-learning-and-induction-heads; ARENA 3.0 [1.2]",
    family="circuits",
    summary=(
        "Induction heads find the previous occurrence of the present token and copy what followed it. They form in one "
        "narrow window of training, in models of two layers or more, and in-context learning comes with them."
    ),
    implements=(
        "paperworks.interpret.circuits.head_scores.prefix_matching",
        "paperworks.interpret.circuits.head_scores.previous_token",
        "paperworks.interpret.circuits.head_scores.in_context_score",
        "paperworks.interpret.circuits.head_scores.frozen_patterns",
    ),
    equation=r"\text{prefix matching}(h) = \operatorname{mean}_{t} A^h_{t,\, t - R + 1} "
    r"\quad \text{on a block of } R \text{ random tokens, repeated}",
    usage="""
import paperworks as pw
import torch
from paperworks import interpret
from paperworks.interpret.circuits import head_scores

model = pw.load("smollm2")
tokens = torch.randint(1000, 40_000, (4, 25)).repeat(1, 2)
with interpret.record(model, "*.pattern") as seen:
    model(tokens)
scores = torch.stack([head_scores.prefix_matching(pattern, 25) for pattern in seen.values()])
layer, head = divmod(int(scores.argmax()), scores.shape[1])
print(f"strongest induction head: {layer}.{head}, prefix matching {float(scores.max()):.2f}")
""",
    notes="The models trained here have attention only, on repeated random tokens: in-context learning is all they can "
    "learn. The paper's 34 language models are not trained again.",
    budget_exception="Three kinds of models are trained for each of three seeds: 3 to 5 minutes.",
)


def _steepest(values: list[float], steps: list[int]) -> int:
    """Step around which a curve rises most."""
    rises = [after - before for before, after in pairwise(values)]
    return steps[1 + max(range(len(rises)), key=lambda index: rises[index])]


def _trained(lab: Lab, depth: int, *, smeared: bool = False) -> Callable[[int], dict[str, float | list[float]]]:
    """An arm: train on repeated random tokens; the loss on the second copy, and what heads attend to."""

    def measured(seed: int) -> dict[str, float | list[float]]:
        run = small.training(Lab(lab.scale, seed), depth, smeared=smeared)
        best = [max(row) for row in run.prefix]
        fall, rise = _steepest([-loss for loss in run.losses], run.steps), _steepest(best, run.steps)
        return {
            "loss on the second copy": run.losses[-1],
            "prefix matching of the best head": best[-1],
            "attention to the token before, first layer": max(run.previous[-1]),
            "steps between fall of the loss and rise of prefix matching": abs(fall - rise),
            "step": [float(step) for step in run.steps],
            "loss": run.losses,
            "prefix matching": best,
        }

    return measured


@paper.claim(
    "Two layers form induction heads in one narrow window of training; one layer does not",
    paper="Arguments 1 and 2: a phase change in which prefix matching and in-context learning rise together, absent in "
    "one-layer models",
    control="the same training with one layer",
)
def form_in_two_layers(lab: Lab) -> Verdict:
    """Train on repeated random tokens, and follow the loss on the second copy and what heads attend to."""
    two, one = "two layers", "one layer"
    verdict = lab.compare(
        arms={two: _trained(lab, 2), one: _trained(lab, 1)},
        main=Beats(two, one, on="loss on the second copy", by=2.0, lower=True),
        also=[
            Beats(two, one, on="prefix matching of the best head", by=0.4),
            AtLeast(two, 0.2, on="attention to the token before, first layer"),
            # The curves are looked at every 50 steps of 1,500.
            AtMost(two, 150, on="steps between fall of the loss and rise of prefix matching"),
        ],
        seeds=3,
        note="log 64 = 4.16 nats is a blind guess. Block lengths from 13 to 36 in training, 25 in the test.",
    )
    lab.curves("loss", x="step", name="formation", title="Loss on the second copy, nats")
    lab.curves(
        "prefix matching", x="step", name="prefix-matching", title="Prefix matching, best head of the last layer"
    )
    return verdict


@paper.claim(
    "With smeared keys one layer is enough",
    paper="Argument 3: an architecture whose keys blend with the keys before them forms induction heads in one layer, "
    "and earlier",
    control="one layer with ordinary keys",
)
def smeared_keys(lab: Lab) -> Verdict:
    """Train one layer whose keys may blend with the key before, one share a head."""
    smeared, plain = "smeared keys", "ordinary keys"
    return lab.compare(
        arms={smeared: _trained(lab, 1, smeared=True), plain: _trained(lab, 1)},
        main=Beats(smeared, plain, on="loss on the second copy", by=2.0, lower=True),
        also=[Beats(smeared, plain, on="prefix matching of the best head", by=0.4)],
        seeds=3,
        note="One layer of four heads; one share a head.",
    )


Head = tuple[int, int]


@torch.no_grad()
def _losses_without(model: nn.Module, tokens: Tensor, heads: list[Head]) -> Tensor:
    """Losses with some heads' outputs at zero and every attention pattern as it was."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def silence(chosen: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda x: x.index_fill(2, torch.tensor(chosen, device=x.device), 0.0)

    with ExitStack() as stack:
        stack.enter_context(head_scores.frozen_patterns(model, tokens))
        if by_layer:
            edits = {f"blocks.{layer}.mixer.heads": silence(chosen) for layer, chosen in by_layer.items()}
            stack.enter_context(edit(model, edits))
        return head_scores.token_losses(model(tokens), tokens)


@paper.claim(
    "In SmolLM2 a few heads carry the continuation of repeated random tokens",
    paper="Arguments 4 to 6: in larger models too, ablating induction heads removes in-context learning; other heads "
    "matter little",
    control="as many other heads, drawn at random from the same layers",
    reach="real",
)
def carry_in_context_learning(lab: Lab) -> Verdict:
    """Find SmolLM2's 20 strongest induction heads on some sequences, and silence them on others."""
    model = smollm2(lab, smoke_depth=4)
    length, rows, count = small.BLOCK, lab.pick(smoke=2, small=6), lab.pick(smoke=2, small=20)

    def sequences(seed: int) -> Tensor:
        block = torch.randint(1000, 40_000, (rows, length), generator=lab.generator(seed))
        return block.repeat(1, 2).to(model.device)

    @cache
    def strongest(seed: int) -> tuple[list[Head], list[Head]]:
        """The heads that match prefixes best, and as many others of their layers."""
        with record(model, "*.pattern") as seen, torch.no_grad():
            model(sequences(1000 + seed))
        marks = torch.stack([head_scores.prefix_matching(pattern, length) for pattern in seen.values()])
        heads = marks.shape[1]
        best = [divmod(index, heads) for index in marks.flatten().argsort(descending=True)[:count].tolist()]
        draws, others = lab.generator(2000 + seed), list[Head]()
        for layer, _ in best:
            free = [(layer, head) for head in range(heads) if (layer, head) not in (*best, *others)]
            others += [free[int(torch.randint(len(free), (1,), generator=draws))]] if free else []
        return best, others

    @cache
    def losses(seed: int, which: int | None) -> Tensor:
        return _losses_without(model, sequences(seed), [] if which is None else strongest(seed)[which])

    def arm(which: int | None) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            found, whole = losses(seed, which), losses(seed, None)
            gain = whole[:length].mean() - whole[length:].mean()
            return {
                "share of the second copy's gain lost": ((found - whole)[length:].mean() / gain).item(),
                "loss on the second copy": found[length:].mean().item(),
                "position": [float(place) for place in range(len(found))],
                "loss, nats": found.tolist(),
            }

        return measured

    without, others = "without induction heads", "without others"
    verdict = lab.compare(
        arms={without: arm(0), others: arm(1), "whole model": arm(None)},
        main=Beats(without, others, on="share of the second copy's gain lost", by=0.4),
        also=[
            AtLeast(without, 0.5, on="share of the second copy's gain lost"),
            AtMost(others, 0.2, on="share of the second copy's gain lost"),
        ],
        seeds=3,
        note=f"{count} heads of 270, silenced with every attention pattern frozen, so the loss is of what they wrote, "
        "not of what later heads looked at. The seed draws the tokens and the other heads; heads are chosen on other "
        "sequences than they are tested on.",
    )
    lab.curves("loss, nats", x="position", name="smollm2", title="Loss of random tokens; the second copy begins at 25")
    return verdict


@paper.claim(
    "The scores are 1 on a model whose induction circuit is written by hand",
    paper="Definition of prefix matching and previous-token attention; uniform attention gives the mean of 1 / (t + 1)",
    kind="exact",
)
def scores_are_exact(lab: Lab) -> Verdict:
    """Measure the hand-set model and uniform attention."""
    model = small.hand_set()
    tokens = small.hand_sequences(lab.pick(smoke=8, small=64), lab.seed)
    with record(model, "*.pattern") as seen, torch.no_grad():
        logits = model(tokens)
    prefix = head_scores.prefix_matching(seen["blocks.1.mixer.pattern"], 11, start=1)[0].item()
    previous = head_scores.previous_token(seen["blocks.0.mixer.pattern"])[0].item()
    loss = head_scores.token_losses(logits, tokens)[12:].max().item()
    time = small.HAND_TIME
    uniform = torch.ones(time, time).tril() / torch.arange(1, time + 1)[:, None]
    expected = sum(1 / (t + 1) for t in range(11, time)) / (time - 11)
    found = head_scores.prefix_matching(uniform[None, None], 11)[0].item()
    return lab.judge(
        checks={
            "prefix matching above 0.99": prefix > 0.99,
            "attention to the token before above 0.99": previous > 0.99,
            "loss on the second copy below 0.01": loss < 0.01,
            "uniform attention gives the mean of 1 / (t + 1), to 1e-6": abs(found - expected) < 1e-6,
        },
        measured={"prefix matching": prefix, "previous token": previous, "largest loss": loss, "uniform": found},
    )
