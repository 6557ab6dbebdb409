"""xFormers: attention to packed sequences without a dense mask, and without padding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from paperworks.data.text.texts import load_text
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.nn import Placement
from paperworks.nn.attention.biases import (
    AttentionBias,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)
from paperworks.nn.attention.memory_efficient import memory_efficient_attention
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="xformers",
    title="xFormers: A modular and hackable Transformer modelling library",
    authors="Lefaudeux, Massa, Liskovich, Xiong, Caggiano, Naren, Xu, Hu, Tintore, Zhang, Labatut, Haziza",
    year=2022,
    ref="github.com/facebookresearch/xformers",
    family="attention",
    summary=(
        "What hides keys is an object, not a matrix: triangles, windows and blocks on the diagonal divide attention "
        "into dense pieces, so that sequences of unequal length stand in one row, unpadded, without seeing each other."
    ),
    implements=(
        "paperworks.nn.attention.memory_efficient.memory_efficient_attention",
        "paperworks.nn.attention.biases.BlockDiagonalMask",
        "paperworks.nn.attention.mask.documents",
    ),
    equation=(
        r"\operatorname{softmax}\left(Q K^\top / \sqrt{d} + B\right) V, \quad B = \text{a description, not a matrix}"
    ),
    usage="""
import torch
from paperworks.nn.attention.biases import BlockDiagonalCausalMask
from paperworks.nn.attention.memory_efficient import memory_efficient_attention

lengths = [5, 300, 40]  # three texts in one row, unpadded
q, k, v = torch.randn(3, 1, sum(lengths), 4, 64).unbind()
out = memory_efficient_attention(q, k, v, BlockDiagonalCausalMask.from_seqlens(lengths))
alone = memory_efficient_attention(q[:, :5], k[:, :5], v[:, :5], BlockDiagonalCausalMask.from_seqlens([5]))
print("difference from the first text alone:", float((out[:, :5] - alone).abs().max()))
""",
)

BIASES: dict[str, tuple[AttentionBias, int, int]] = {
    "lower triangle": (LowerTriangularMask(), 40, 60),
    "lower triangle from the bottom right": (LowerTriangularFromBottomRightMask(), 40, 60),
    "local from the bottom right": (LocalAttentionFromBottomRightMask(7, 2), 300, 320),
    "block-diagonal": (BlockDiagonalMask.from_seqlens([5, 30, 17], [9, 12, 40]), 52, 61),
    "block-diagonal, causal": (BlockDiagonalCausalMask.from_seqlens([5, 30, 17]), 52, 52),
    "block-diagonal, padded keys": (
        BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 3, 2], [9, 20, 2], kv_padding=24),
        6,
        72,
    ),
}


@paper.claim(
    "Every bias equals its dense mask, and a packed call a loop over its sequences",
    paper="xformers.ops.fmha.attn_bias: each bias offers materialize(shape) for testing",
    kind="exact",
    control="a causal mask aligned to the first key where queries stand at the last ones",
)
@torch.no_grad()
def biases_are_exact(lab: Lab) -> Verdict:
    """Compare with softmax(q k^T / sqrt(d) + mask) v written out, in float64."""
    draws = torch.Generator().manual_seed(lab.seed)
    gaps = {}
    for name, (bias, queries, keys) in BIASES.items():
        q, k, v = (torch.randn(1, n, 3, 8, generator=draws, dtype=torch.float64) for n in (queries, keys, keys))
        found = memory_efficient_attention(q, k, v, bias)
        gaps[name] = float((found - _written_out(q, k, v, bias)).abs().max())
        if isinstance(bias, LowerTriangularFromBottomRightMask):
            misaligned = float((memory_efficient_attention(q, k, v, LowerTriangularMask()) - found).abs().max())
    lengths = [3, 50, 1, 20]
    packed = BlockDiagonalCausalMask.from_seqlens(lengths)
    q, k, v = (torch.randn(1, sum(lengths), 3, 8, generator=draws, dtype=torch.float64) for _ in range(3))
    loop = []
    for parts in zip(*(packed.split(tensor) for tensor in (q, k, v)), strict=True):
        own, keys_of, values_of = (part.transpose(1, 2) for part in parts)
        loop.append(functional.scaled_dot_product_attention(own, keys_of, values_of, is_causal=True))
    alone = float((memory_efficient_attention(q, k, v, packed).transpose(1, 2) - torch.cat(loop, 2)).abs().max())
    return lab.judge(
        checks={
            **{f"{name}: within 1e-12 of its mask": gap < 1e-12 for name, gap in gaps.items()},
            "packed equals the loop": alone < 1e-12,
            "the other alignment is another function": misaligned > 0.1,
        },
        measured={"largest gap, biases": max(gaps.values()), "largest gap, packed": alone},
        control={"largest gap, other alignment": misaligned},
        note="Three heads of 8 channels, random queries, keys and values.",
    )


def _hidden(bias: AttentionBias, queries: int, keys: int) -> Tensor:
    """Return the mask from what the names say, pair by pair: nothing of it comes from the pieces."""
    mask = torch.full((queries, keys), -math.inf, dtype=torch.float64)
    own, slot = 0, 0
    if isinstance(bias, BlockDiagonalMask):
        for asks, has in zip(bias.q_seqlen, bias.kv_seqlen, strict=True):
            for i in range(asks):
                last = {BlockDiagonalCausalMask: i, BlockDiagonalCausalWithOffsetPaddedKeysMask: i + has - asks}
                for j in range(has):
                    if j <= last.get(type(bias), has):
                        mask[own + i, slot + j] = 0.0
            own, slot = own + asks, slot + (bias.kv_padding or has)
        return mask
    for i in range(queries):
        at = i if isinstance(bias, LowerTriangularMask) else i + keys - queries
        ahead = getattr(bias, "window_right", 0)
        behind = getattr(bias, "window_left", None)
        for j in range(keys):
            if j <= at + ahead and (behind is None or j >= at - behind):
                mask[i, j] = 0.0
    return mask


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    mask = _hidden(bias, q.shape[1], k.shape[1])
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + mask).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@cache
def _sequences(lab: Lab, seed: int) -> list[Int[Tensor, " time"]]:
    """Passages of a play, 5 to 500 tokens long, as many short as long ones (lengths are log-uniform)."""
    count, longest = lab.pick(smoke=(6, 40), small=(24, 400))
    draws = lab.generator(seed)
    lengths = torch.linspace(math.log(5), math.log(longest), count).exp().round().long()
    lengths = lengths[torch.randperm(count, generator=draws)]
    text = load_text("tinyshakespeare", download=True).text[:200_000]
    tokens = torch.tensor(smollm2(lab, smoke_depth=2).tokenizer.encode(text))
    starts = torch.randint(len(tokens) - longest, (count,), generator=draws)
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@paper.claim(
    "Texts in one row: no padding, the same logits as each alone",
    paper="BlockDiagonalMask.from_seqlens: packed batches of variable length",
    kind="exact",
    control="the row without segments, where each text sees those before it",
)
@torch.no_grad()
def packs_without_padding(lab: Lab) -> Verdict:
    """Run SmolLM2 on texts of 5 to 400 tokens alone and in one row."""
    model, texts = smollm2(lab, smoke_depth=2), _sequences(lab, lab.seed)
    row = torch.cat(texts)[None]
    lengths = [len(text) for text in texts]
    segments = torch.repeat_interleave(torch.arange(len(texts)) + 1, torch.tensor(lengths))[None]
    gap = wrong = largest = 0.0
    with lab.threads(1):
        apart = torch.cat([model.hidden(text[None]) for text in lab.track(texts, "texts")], 1)
        packed, mixed = model.hidden(row, Placement(segments=segments)), model.hidden(row)
        for parts in zip(*(hidden[0].split(256) for hidden in (apart, packed, mixed)), strict=True):
            alone, together, unmasked = map(model.logits, parts)  # of all tokens at once they would fill memory
            gap = max(gap, float((together - alone).abs().max()))
            wrong = max(wrong, float((unmasked - alone).abs().max()))
            largest = max(largest, float(alone.abs().max()))
    padded = len(texts) * max(lengths)
    return lab.judge(
        checks={
            "logits within 1e-4 of their range": gap <= 1e-4 * largest,
            "under 60% of the padded tokens": sum(lengths) < 0.6 * padded,
            "without segments they differ by over 1": wrong > 1.0,
        },
        measured={
            "tokens in the row": sum(lengths),
            "share of padded": sum(lengths) / padded,
            "largest gap of logits": gap,
            "largest logit": largest,
        },
        control={"padded tokens": padded, "largest gap of logits without segments": wrong},
        note=f"{len(texts)} passages of tinyshakespeare, float32. Sums over 30 layers differ by more than 1e-4 itself, "
        "whatever the division: the range is the measure.",
    )


@paper.claim(
    "Attention in pieces is faster than under a dense mask",
    paper="memory_efficient_attention with BlockDiagonalMask: what no query sees is not computed",
    control="torch's kernel with the mask written out over the row",
    reach="real",
)
@torch.no_grad()
def pieces_are_faster(lab: Lab) -> Verdict:
    """Time the attention of one layer of SmolLM2's shape over packed passages, both ways in turn."""
    rounds = lab.pick(smoke=1, small=5)

    @cache
    def timed(seed: int) -> dict[str, float]:
        lengths = [len(text) for text in _sequences(lab, seed)]
        time_, draws = sum(lengths), lab.generator(seed)
        q = torch.randn(1, time_, 3, 3, 64, generator=draws)
        k = torch.randn(1, time_, 3, 1, 64, generator=draws)
        bias = BlockDiagonalCausalMask.from_seqlens(lengths)
        ways: dict[str, AttentionBias | Tensor] = {"pieces": bias, "dense mask": bias.materialize((1, 1, time_, time_))}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with lab.threads(1):
            for _ in range(rounds):
                for name, hidden in ways.items():
                    began = time.perf_counter()
                    memory_efficient_attention(q, k, k, hidden)
                    seconds[name].append(time.perf_counter() - began)
        return {name: 1000 * min(found) for name, found in seconds.items()}

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"milliseconds": timed(seed)[name]}

    verdict = lab.compare(
        arms={name: arm(name) for name in ("pieces", "dense mask")},
        main=Beats("pieces", "dense mask", on="milliseconds", by_ratio=0.5, lower=True),
        seeds=3,
        note="24 passages of 5 to 400 tokens, one thread, float32; the smallest time of the rounds. Only the ratio "
        "says "
        "something.",
    )
    lab.points("milliseconds", name="packed", title="Attention of one layer, milliseconds")
    return verdict
