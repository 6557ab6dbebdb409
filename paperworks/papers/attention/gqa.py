"""Grouped-query attention: a trained model's key-value heads are averaged in groups and trained a little more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.models import Decoder, DecoderModel, count_parameters
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
    equation=(
        r"\text{head } h \text{ reads } K_{\lfloor h G / H \rfloor}, V_{\lfloor h G / H \rfloor}; \quad W_{K,g} = "
        r"\tfrac{G}{H} \sum_{h \in g} W_{K,h}"
    ),
    usage="""
import paperworks as pw
from paperworks.models.surgery.uptraining import pool_key_value_heads

model = pw.load("smollm2")  # 9 query heads that share 3 key-value heads
pooled = pool_key_value_heads(model, 1)  # to one: train it on to recover
print("bytes of cache a token:", model.new_cache(1, 1).bytes(), "->", pooled.new_cache(1, 1).bytes())
""",
)

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


@paper.claim(
    "After a tenth of the training two averaged key-value heads are near the original, and one is not",
    paper="Table 1: with alpha = 0.05 GQA-8 reaches 47.1 against 47.2 of MHA, MQA 46.6; Figure 4: mean > first > "
    "random",
    control="heads drawn at random, converted and trained alike; the first head of each group; one head for all",
    reach="real",
)
def uptraining_recovers(lab: Lab) -> Verdict:
    """Convert character models of 8 heads, train on for a tenth of the steps with the original recipe, and compare."""
    play()  # before the bars: it may have to be fetched
    steps = lab.pick(smoke=4, small=320, large=4000)
    extra = max(2, steps // 10)
    spec = character_llama(heads=HEADS, depth=lab.pick(smoke=1, small=2))
    original = cache(lambda seed: trained(lab, spec, steps, seed, "8 heads"))

    def arm(kv_heads: int, method: Pooling = "mean") -> Callable[[int], dict[str, float]]:
        def losses(seed: int) -> dict[str, float]:
            model = copy.deepcopy(original(seed))
            if kv_heads < HEADS:
                model = pool_key_value_heads(model, kv_heads, method)
            converted = held_out_loss(lab, model)
            # A fresh optimizer, and windows that the first training did not draw.
            further_trained(lab, model, extra, seed + 1000, "up-training")
            return {"loss": held_out_loss(lab, model), "loss before up-training": converted}

        return losses

    verdict = lab.compare(
        arms={
            "2 heads, mean": arm(2),
            "2 heads, first": arm(2, "first"),
            "2 heads, random": arm(2, "random"),
            "1 head, mean": arm(1),
            "8 heads, trained on": arm(HEADS),
        },
        main=Beats("2 heads, mean", "2 heads, random", on="loss", by=0.02, lower=True),
        also=[
            Beats("2 heads, mean", "2 heads, first", on="loss", lower=True),
            Beats("2 heads, mean", "1 head, mean", on="loss", lower=True),
            Within("2 heads, mean", "8 heads, trained on", on="loss", by=0.05, lower=True),
        ],
        seeds=3,
        note=f"Two layers of width 64, {steps} steps of training, {extra} of up-training (alpha = "
        f"{extra / steps:.2f}); "
        "nats a character on the last tenth of tinyshakespeare. Heads trained apart have no common basis: right after "
        "conversion the mean of unlike keys is small and attends everywhere, while a first head still serves the "
        "queries it was trained with. An earlier design compared there and put first before mean, also on SmolLM2.",
    )
    lab.points("loss", name="uptraining", title="Loss after up-training")
    return verdict
