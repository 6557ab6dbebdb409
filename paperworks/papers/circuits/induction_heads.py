"""Induction heads: how a transformer comes to continue what it has seen before."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.interpret import edit, record
from paperworks.interpret.circuits import head_scores
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
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
)


@paper.claim(
    "Two layers form induction heads in one narrow window of training; one layer does not",
    paper="Arguments 1 and 2: a phase change in which prefix matching and in-context learning rise together, absent in "
    "one-layer models",
    control="the same training with one layer",
)
def form_in_two_layers(lab: Lab) -> Verdict:
    """Train on repeated random tokens, and follow the loss on the second copy and what heads attend to."""
    two, one = small.training(lab, 2), small.training(lab, 1)
    best = [max(row) for row in two.prefix]
    drop = _steepest([-loss for loss in two.losses], two.steps)
    rise = _steepest(best, two.steps)
    with lab.figure("formation", figsize=(8.6, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(one.steps, one.losses, color=CONTROL, label="one layer (control)")
        left.plot(two.steps, two.losses, color=COLORS[0], label="two layers")
        left.set_title("Loss on the second copy, nats")
        left.set_xlabel("training step")
        left.legend(loc="center right")
        right.plot(one.steps, [max(row) for row in one.prefix], color=CONTROL, label="prefix matching, one layer")
        right.plot(two.steps, best, color=COLORS[0], label="prefix matching, layer 1")
        right.plot(
            two.steps, [max(row) for row in two.previous], "--", color=COLORS[1], label="previous token, layer 0"
        )
        right.set_title("Best head's attention")
        right.set_xlabel("training step")
        right.set_ylim(-0.03, 1.03)
        right.legend(loc="upper left", fontsize=8)
    return lab.judge(
        checks={
            "two layers: loss on the second copy below 1 nat": two.losses[-1] < 1.0,
            "best prefix matching of the second layer above 0.5": best[-1] > 0.5,
            "best attention to the token before, first layer, above 0.2": max(two.previous[-1]) > 0.2,
            "the loss falls and prefix matching rises within 150 steps of each other": abs(drop - rise) <= 150,
            "one layer stays above 3 nats": one.losses[-1] > 3.0,
        },
        measured={
            "loss on the second copy": two.losses[-1],
            "prefix matching of the second layer": two.prefix[-1],
            "previous token, first layer": two.previous[-1],
            "steepest fall of the loss, step": drop,
            "steepest rise of prefix matching, step": rise,
        },
        control={"loss on the second copy": one.losses[-1], "prefix matching": one.prefix[-1]},
        note="log 64 = 4.16 nats is a blind guess. Block lengths from 13 to 36 in training, 25 in the test.",
    )


def _steepest(values: list[float], steps: list[int]) -> int:
    """Return the step around which a curve rises most."""
    rises = [after - before for before, after in pairwise(values)]
    return steps[1 + max(range(len(rises)), key=lambda index: rises[index])]


@paper.claim(
    "With smeared keys one layer is enough",
    paper="Argument 3: an architecture whose keys blend with the keys before them forms induction heads in one layer, "
    "and earlier",
    control="one layer with ordinary keys",
)
def smeared_keys(lab: Lab) -> Verdict:
    """Train one layer whose keys may blend with the key before, one share a head."""
    plain, smeared = small.training(lab, 1), small.training(lab, 1, smeared=True)
    alphas: Any = smeared.model.smear
    return lab.judge(
        checks={
            "smeared: loss on the second copy below 1 nat": smeared.losses[-1] < 1.0,
            "smeared: prefix matching of the best head above 0.5": max(smeared.prefix[-1]) > 0.5,
            "ordinary keys stay above 3 nats": plain.losses[-1] > 3.0,
        },
        measured={
            "loss on the second copy": smeared.losses[-1],
            "prefix matching": smeared.prefix[-1],
            "share of a key's own token": torch.sigmoid(alphas.detach())[0],
        },
        control={"loss on the second copy": plain.losses[-1], "prefix matching": plain.prefix[-1]},
    )


def _ablated(model: nn.Module, tokens: Tensor, heads: list[tuple[int, int]], *, frozen: bool) -> Tensor:
    """Return the losses with some heads' outputs at zero; `frozen` keeps all attention patterns as they were."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def silence(chosen: list[int]) -> Any:
        return lambda x: x.index_fill(2, torch.tensor(chosen, device=x.device), 0.0)

    edits = {f"blocks.{layer}.mixer.heads": silence(chosen) for layer, chosen in by_layer.items()}
    with ExitStack() as stack:
        if frozen:
            stack.enter_context(head_scores.frozen_patterns(model, tokens))
        if edits:
            stack.enter_context(edit(model, edits))
        with torch.no_grad():
            return head_scores.token_losses(model(tokens), tokens)


@paper.claim(
    "In SmolLM2 a few heads carry the continuation of repeated random tokens",
    paper="Arguments 4 to 6: in larger models too, ablating induction heads removes in-context learning; other heads "
    "matter little",
    control="as many other heads, drawn at random from the same layers",
)
def carry_in_context_learning(lab: Lab) -> Verdict:
    """Find SmolLM2's induction heads on random tokens and silence them, then as many others, patterns frozen."""
    model = smollm2(lab, smoke_depth=4)
    tokenizer: Any = model.tokenizer
    length = small.BLOCK
    draws = torch.Generator().manual_seed(lab.seed)
    rows = lab.pick(smoke=2, small=8)
    block = torch.randint(1000, min(40_000, tokenizer.vocab_size), (rows, length), generator=draws)
    tokens = block.repeat(1, 2).to(model.device)
    with record(model, "*.pattern") as seen, torch.no_grad():
        model(tokens)
    marks = torch.stack([head_scores.prefix_matching(pattern, length) for pattern in seen.values()])
    count = lab.pick(smoke=2, small=20)
    heads = marks.shape[1]
    best = [divmod(index, heads) for index in marks.flatten().argsort(descending=True)[:count].tolist()]
    others = []
    for layer, _ in best:
        free = [(layer, head) for head in range(heads) if (layer, head) not in best and (layer, head) not in others]
        others += [free[int(torch.randint(len(free), (1,), generator=draws))]] if free else []
    losses = {
        name: _ablated(model, tokens, chosen, frozen=True)
        for name, chosen in (("whole", []), ("without induction heads", best), ("without others", others))
    }
    second = {name: values[length:].mean().item() for name, values in losses.items()}
    score = {name: head_scores.in_context_score(values, 5, length + 20) for name, values in losses.items()}
    _draw_ablation(lab, losses, marks)
    gain = losses["whole"][:length].mean().item() - second["whole"]
    return lab.judge(
        checks={
            "without them the second copy loses more than half of what the first taught": second[
                "without induction heads"
            ]
            - second["whole"]
            > gain / 2,
            "without others it loses less than a fifth as much": second["without others"] - second["whole"]
            < 0.2 * (second["without induction heads"] - second["whole"]),
            "the best head matches prefixes above 0.5": marks.max() > 0.5,
        },
        measured={
            "heads with prefix matching above 0.3": int((marks > 0.3).sum()),
            "strongest": [f"{layer}.{head}" for layer, head in best[:6]],
            "loss on the first copy": losses["whole"][:length].mean(),
            "loss on the second copy": second["whole"],
            "without the 20 strongest": second["without induction heads"],
            "in-context score, whole and without them": [score["whole"], score["without induction heads"]],
        },
        control={"loss without 20 others": second["without others"], "in-context score": score["without others"]},
        note="Heads are silenced with every attention pattern frozen, so the loss is of what they wrote, not of what "
        "later heads looked at.",
    )


def _draw_ablation(lab: Lab, losses: dict[str, Tensor], marks: Tensor) -> None:
    with lab.figure("smollm2", figsize=(9.0, 3.7)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        for (_, values), color, label in zip(
            losses.items(),
            (COLORS[0], COLORS[1], CONTROL),
            ("whole model", "without 20 induction heads", "without 20 others (control)"),
            strict=True,
        ):
            left.plot(values.tolist(), color=color, label=label)
        left.axvline(small.BLOCK - 0.5, color=INK, linewidth=0.8, linestyle=":")
        left.text(small.BLOCK, left.get_ylim()[1] * 0.96, "second copy", fontsize=9, va="top")
        left.set_title("Loss of random tokens, nats")
        left.set_xlabel("position")
        left.legend(loc="lower left", fontsize=8)
        image = right.imshow(marks.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", rasterized=True)
        right.set_title("Prefix matching")
        right.set_xlabel("head")
        right.set_ylabel("block")
        right.grid(False)
        figure.colorbar(image, ax=right, fraction=0.05)


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
