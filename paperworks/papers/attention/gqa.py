"""Grouped-query attention: a trained model's key-value heads are averaged in groups and trained a little more."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from paperworks import api, train
from paperworks.data.text.texts import load_text
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import Block, Decoder, DecoderModel, count_parameters
from paperworks.models.surgery.uptraining import Pooling, pool_key_value_heads
from paperworks.nn import Attention
from paperworks.testbeds.characters import character_llama, further_trained, held_out_loss, play, trained

paper = Paper(
    key="gqa",
    title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    authors="Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebron, Sanghai",
    year=2023,
    ref="arXiv:2305.13245",
    family="attention",
    summary=(
        "Groups of query heads share one key and one value head, which shrinks the cache by the size of a group; a "
        "multi-head checkpoint is converted by averaging the heads of each group and recovers in 5% of its training."
    ),
    implements=(
        "paperworks.models.surgery.uptraining.pool_key_value_heads",
        "paperworks.nn.attention.attention.Attention",
    ),
)

METHODS: tuple[Pooling, ...] = get_args(Pooling)
HEADS = 8


def _small(heads: int, kv_heads: int | None, bias: bool = False) -> Decoder:
    """A random model with large weights, so that a wrong head shows."""
    mixer = Attention(heads=heads, kv_heads=kv_heads, bias=bias)
    base = character_llama(dim=32, depth=2)
    return replace(base, vocab_size=50, block=replace(base.blocks[0], mixer=mixer), init_std=0.2)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _projections(model: DecoderModel) -> list[torch.nn.Linear]:
    mixers = [block.mixer for block in model.blocks]
    return [linear for mixer in mixers for linear in (mixer.key, mixer.value)]  # type: ignore[union-attr, misc]


@paper.claim(
    "Query head i reads key-value head floor(i G / h), and conversion keeps what groups share",
    paper="Section 2.2 and Figure 2; Section 2.1: the projections are mean-pooled, not the activations",
    kind="exact",
    control="groups of interleaved heads, and heads that do not share their weights",
)
@torch.no_grad()
def conversion_is_exact(lab: Lab) -> Verdict:
    """Compare with keys and values repeated by hand, and convert models whose groups already share their heads."""
    tokens = torch.randint(50, (2, 12))
    grouped = _small(HEADS, 2).build()
    consecutive, interleaved = (
        _expanded(grouped, lambda x: x.repeat_interleave(4, 0)),
        _expanded(grouped, lambda x: x.repeat(4, 1, 1)),
    )
    back = pool_key_value_heads(consecutive, 2)
    there_and_back = max(
        _largest(one - other) for one, other in zip(back.parameters(), grouped.parameters(), strict=True)
    )
    measured = {
        "grouped against repeated heads": _largest(consecutive(tokens) - grouped(tokens)),
        "shared heads, mean-pooled": _largest(back(tokens) - consecutive(tokens)),
        "weights repeated and pooled again": there_and_back,
    }
    free = _small(HEADS, None).build()
    control = {
        "grouped against interleaved heads": _largest(interleaved(tokens) - grouped(tokens)),
        "heads of their own, mean-pooled": _largest(pool_key_value_heads(free, 2)(tokens) - free(tokens)),
    }
    rounding = 1e-4  # float32 logits of magnitude 10
    return lab.judge(
        checks={
            "consecutive query heads share a head": measured["grouped against repeated heads"] < rounding,
            "shared heads survive conversion": measured["shared heads, mean-pooled"] < rounding,
            "repeating and pooling is the identity": there_and_back == 0.0,
            "interleaved groups are another model": control["grouped against interleaved heads"] > 0.1,
            "heads of their own do not survive": control["heads of their own, mean-pooled"] > 0.1,
        },
        measured=measured,
        control=control,
        note="Largest differences of logits (or weights), 8 query heads and 2 groups.",
    )


def _expanded(model: DecoderModel, expand: Callable[[Tensor], Tensor]) -> DecoderModel:
    """Give every query head a key-value head of its own, by repeating those there are."""
    wide = _small(HEADS, None).build()
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if ".key." in name or ".value." in name:
            state[name] = expand(tensor.unflatten(0, (2, -1))).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


@paper.claim(
    "Key-value parameters and cache shrink by the size of a group",
    paper="Section 2.2: going from multi-head to multi-query attention cuts them by a factor of h",
    kind="exact",
)
def sizes_shrink(lab: Lab) -> Verdict:
    """Count both for 8, 4, 2 and 1 key-value heads."""
    capacity = 64
    whole = _small(HEADS, None, bias=True).build()
    parameters = sum(parameter.numel() for linear in _projections(whole) for parameter in linear.parameters())
    cache = whole.new_cache(1, capacity).bytes()
    rows: list[tuple[int, int, int, int]] = []
    for kv_heads in (8, 4, 2, 1):
        pooled = pool_key_value_heads(whole, kv_heads)
        kept = sum(parameter.numel() for linear in _projections(pooled) for parameter in linear.parameters())
        rows.append((kv_heads, kept, pooled.new_cache(1, capacity).bytes(), count_parameters(pooled)))
    lab.table(
        "8 query heads, width 32, 2 layers, 64 tokens in the cache",
        ["key-value heads", "key-value parameters", "cache bytes", "all parameters"],
        rows,
    )
    return lab.judge(
        checks={
            "parameters": all(kept * HEADS == parameters * kv_heads for kv_heads, kept, _, _ in rows),
            "cache": all(held * HEADS == cache * kv_heads for kv_heads, _, held, _ in rows),
            "2 * layers * heads * head width * 4 bytes a token": cache == capacity * 2 * 2 * 8 * 4 * 4,
            "nothing else changes": all(whole_ - kept == rows[0][3] - rows[0][1] for _, kept, _, whole_ in rows),
        },
        measured={"key-value parameters": [row[1] for row in rows], "cache bytes": [row[2] for row in rows]},
    )


def _conversions(
    lab: Lab, model: DecoderModel, score: Callable[[DecoderModel], float], groups: tuple[int, ...], draws: int
) -> dict[int, dict[str, float]]:
    """Return the loss right after each conversion; "random" is the mean of several draws."""
    found: dict[int, dict[str, float]] = {}
    for kv_heads in groups:
        torch.manual_seed(lab.seed)
        found[kv_heads] = {
            method: statistics.fmean(
                score(pool_key_value_heads(model, kv_heads, method)) for _ in range(draws if method == "random" else 1)
            )
            for method in METHODS
        }
    return found


def _in_order(losses: dict[str, float]) -> bool:
    return losses["mean"] < losses["first"] < losses["random"]


@paper.claim(
    "Averaging the heads of a group keeps more of the model than taking one, and that more than starting anew",
    paper="Figure 4: after up-training T5-Large to MQA with alpha = 0.05, mean > first > random",
    control="the first head of each group, and heads drawn at random",
)
def mean_pooling_keeps_most(lab: Lab) -> Verdict:
    """Train character models of 8 heads and score them right after each conversion to 2 and to 1 head."""
    steps, seeds = _steps(lab), _seeds(lab)
    found: dict[int, dict[str, list[float]]] = {2: {}, 1: {}}
    before: list[float] = []
    for seed in seeds:
        model = _original(lab, steps, seed)
        before.append(held_out_loss(lab, model))
        conversions = _conversions(lab, model, lambda each: held_out_loss(lab, each), (2, 1), draws=3)
        for kv_heads, losses in conversions.items():
            for method, loss in losses.items():
                found[kv_heads].setdefault(method, []).append(loss)
    means = {
        kv_heads: {method: statistics.fmean(losses) for method, losses in methods.items()}
        for kv_heads, methods in found.items()
    }
    _draw_conversions(lab, statistics.fmean(before), means)
    return lab.judge(
        checks={
            "mean < first < random with 2 heads": _in_order(means[2]),
            "mean < first < random with 1 head": _in_order(means[1]),
            "2 heads keep more than 1": means[2]["mean"] < means[1]["mean"],
        },
        measured={
            "loss, 8 heads": statistics.fmean(before),
            "loss, 2 heads, mean": means[2]["mean"],
            "loss, 1 head, mean": means[1]["mean"],
            "loss by seed, 2 heads, mean": found[2]["mean"],
        },
        control={
            f"loss, {kv_heads} {'heads' if kv_heads > 1 else 'head'}, {method}": means[kv_heads][method]
            for kv_heads in (2, 1)
            for method in ("first", "random")
        },
        note=f"4 layers, width 64, {steps} steps on characters of tinyshakespeare, seeds "
        f"{', '.join(map(str, seeds))}; nats a character on the last tenth, before any up-training. "
        "The paper compares after up-training (next claim). Heads trained apart have no common basis: the mean of "
        "unlike keys is small and attends everywhere, while a first head still serves the queries it was trained with.",
    )


def _steps(lab: Lab) -> int:
    return lab.pick(smoke=4, small=600, large=4000)


def _seeds(lab: Lab) -> tuple[int, ...]:
    return lab.pick(smoke=(lab.seed,), small=(lab.seed, lab.seed + 1))


_ORIGINALS: dict[tuple[int, int], DecoderModel] = {}  # two claims start from the same trained models


def _original(lab: Lab, steps: int, seed: int) -> DecoderModel:
    """Return a copy of the model that is converted; it is trained by the claim that asks first."""
    if (steps, seed) not in _ORIGINALS:
        play()  # before the bars: it may have to be fetched
        spec = character_llama(heads=HEADS, depth=lab.pick(smoke=1, small=4))
        _ORIGINALS[steps, seed] = trained(lab, spec, steps, seed, f"8 heads, seed {seed}")
    return copy.deepcopy(_ORIGINALS[steps, seed])


def _draw_conversions(lab: Lab, before: float, means: dict[int, dict[str, float]]) -> None:
    with lab.figure("conversion", figsize=(7.6, 3.0)) as figure:
        axes = figure.subplots()
        names = [f"{kv} key-value {'heads' if kv > 1 else 'head'}, {method}" for kv in means for method in METHODS]
        values = [means[kv][method] for kv in means for method in METHODS]
        colors = [COLORS[0] if method == "mean" else CONTROL for _ in means for method in METHODS]
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=5, color=INK)
        axes.axvline(before, color=COLORS[1], linewidth=1.6)
        axes.text(before, -0.75, f" 8 heads: {before:.2f}", color=COLORS[1], va="bottom")
        axes.set_ylim(len(names) - 0.4, -1.0)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("nats a character on held out text")
        axes.set_title("Right after conversion, before any training")


@paper.claim(
    "A tenth of the training brings two key-value heads back to the original's loss, and closer than one",
    paper="Figures 3 to 5, Table 1: with alpha = 0.05 GQA-8 reaches 47.1 against 47.2 of MHA, MQA 46.6; for MQA, mean "
    "> first > random",
    control="multi-query attention, converted and trained alike; the original trained on for the same steps",
)
def uptraining_recovers(lab: Lab) -> Verdict:
    """Convert to 2 heads and to 1, train on for a tenth of the steps with the original recipe, and compare."""
    steps, seeds = _steps(lab), _seeds(lab)
    extra = max(2, steps // 10)
    losses: dict[str, list[float]] = {}
    for seed in seeds:
        model = _original(lab, steps, seed)
        losses.setdefault("before", []).append(held_out_loss(lab, model))
        starts = {
            "GQA-2": pool_key_value_heads(model, 2),
            "MQA": pool_key_value_heads(model, 1),
            "MQA, first": pool_key_value_heads(model, 1, "first"),
            "MQA, random": pool_key_value_heads(model, 1, "random"),
            "trained on": model,
        }
        for name, start in starts.items():
            # A fresh optimizer, and windows that the first training did not draw.
            on = further_trained(lab, start, extra, seed + 1000, f"{name}, seed {seed}")
            losses.setdefault(name, []).append(held_out_loss(lab, on))
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    return lab.judge(
        checks={
            "GQA-2 is within 0.05 nats of the original": means["GQA-2"] <= means["before"] + 0.05,
            "and better than MQA": means["GQA-2"] < means["MQA"],
            "up-trained MQA is in the order mean < first < random": (
                means["MQA"] < means["MQA, first"] < means["MQA, random"]
            ),
        },
        measured={
            "loss, GQA-2 after up-training": means["GQA-2"],
            "loss, the original": means["before"],
            "by seed, GQA-2": losses["GQA-2"],
        },
        control={
            "loss, MQA after up-training": means["MQA"],
            "loss, MQA from first heads after up-training": means["MQA, first"],
            "loss, MQA from random heads after up-training": means["MQA, random"],
            "loss, the original trained on": means["trained on"],
            "by seed, MQA": losses["MQA"],
        },
        note=f"{steps} steps of training, {extra} of up-training (alpha = {extra / steps:.2f}), seeds "
        f"{', '.join(map(str, seeds))}; nats a character on the last tenth of tinyshakespeare.",
    )


@paper.claim(
    "SmolLM2's three key-value heads merge into one, best by their mean",
    paper="Figure 4, here before any up-training, on a model that already shares each head among three queries",
    control="the first of the three heads, and a head drawn at random",
)
def merges_smollm2(lab: Lab) -> Verdict:
    """Convert SmolLM2-135M from 3 key-value heads to 1 and score it on text."""
    model = api.load("smollm2", device=lab.device)
    length = lab.pick(smoke=16, small=384, large=4096)
    text = load_text("tinyshakespeare", download=True).text
    tokens = torch.tensor(model.tokenizer.encode(text[: 8 * length], bos=False)[:length], device=lab.device)

    def score(each: DecoderModel) -> float:
        return train.evaluate(each, train.next_token_loss, [tokens[None]])["loss"]

    before = score(model)
    with lab.progress("conversions", 1):
        after = _conversions(lab, model, score, (1,), draws=1)[1]
    (block,) = set(model.spec.blocks)
    assert isinstance(block, Block)
    return lab.judge(
        checks={
            "mean < first < random": _in_order(after),
            "none of it comes free": after["mean"] > before + 0.5,
        },
        measured={
            "loss, 3 heads": before,
            "loss, 1 head, mean": after["mean"],
            "cache bytes a token, 3 heads": model.new_cache(1, 1).bytes(),
        },
        control={"loss, 1 head, first": after["first"], "loss, 1 head, random": after["random"]},
        note=f"{length} tokens of tinyshakespeare; nats a token. Up-training it back is a matter of a GPU.",
    )
