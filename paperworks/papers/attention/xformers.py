"""xFormers: attention to packed sequences without a dense mask, and without padding."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from paperworks.data.text.texts import load_text
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
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


def _sequences(lab: Lab, model: DecoderModel) -> list[Int[Tensor, " time"]]:
    """Return passages of a play, 5 to 500 tokens long, as many short as long ones (lengths are log-uniform)."""
    count, longest = lab.pick(smoke=(6, 40), small=(32, 500))
    draws = torch.Generator().manual_seed(lab.seed)
    lengths = torch.linspace(math.log(5), math.log(longest), count).exp().round().long()
    lengths = lengths[torch.randperm(count, generator=draws)]
    tokens = torch.tensor(model.tokenizer.encode(load_text("tinyshakespeare", download=True).text[:200_000]))
    starts = torch.randint(len(tokens) - longest, (count,), generator=draws)
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _logits(model: DecoderModel, hidden: Float[Tensor, "1 time dim"]) -> Iterator[Float[Tensor, "some vocab"]]:
    """Yield the logits of some tokens at a time: of all they would fill memory."""
    for part in hidden[0].split(256):
        yield model.logits(part)


@paper.claim(
    "32 texts in one row: no padding, the same logits as each alone",
    paper="BlockDiagonalMask.from_seqlens: packed batches of variable length; memory_efficient_attention",
    control="the row without segments, where each text sees those before it; and a dense mask over the row",
)
@torch.no_grad()
def packs_without_padding(lab: Lab) -> Verdict:
    """Run SmolLM2 on texts of 5 to 500 tokens alone and in one row; time attention in pieces and under a mask."""
    model = smollm2(lab, smoke_depth=2)
    texts = _sequences(lab, model)
    lengths = [len(text) for text in texts]
    row = torch.cat(texts)[None]
    segments = torch.repeat_interleave(torch.arange(len(texts)) + 1, torch.tensor(lengths))[None]
    with lab.threads(1), lab.progress("texts", len(texts)) as advance:
        alone = []
        for text in texts:
            alone.append(model.hidden(text[None]))
            advance(1)
        start = time.perf_counter()
        packed = model.hidden(row, Placement(segments=segments))
        seconds = time.perf_counter() - start
        mixed = model.hidden(row)
        apart = torch.cat(alone, 1)
        gap = max(
            float((a - b).abs().max()) for a, b in zip(_logits(model, packed), _logits(model, apart), strict=True)
        )
        range_ = max(float(some.abs().max()) for some in _logits(model, apart))
        wrong = max(
            float((a - b).abs().max()) for a, b in zip(_logits(model, mixed), _logits(model, apart), strict=True)
        )
        ratio, masked, pieces = _attention_times(lab, row.shape[1], lengths)
    padded = len(texts) * max(lengths)
    with lab.figure("packed", figsize=(7.2, 3.0)) as figure:
        left, right = figure.subplots(1, 2)
        left.bar(["padded", "packed"], [padded, sum(lengths)], color=[CONTROL, COLORS[0]])
        left.set_ylabel("tokens computed")
        right.bar(["dense mask", "pieces"], [1000 * masked, 1000 * pieces], color=[CONTROL, COLORS[0]])
        right.set_ylabel("ms, attention of one layer")
    return lab.judge(
        checks={
            "under 60% of the padded tokens": sum(lengths) < 0.6 * padded,
            "logits within 1e-4 of their range": gap <= 1e-4 * range_,
            "without segments they differ by over 1": wrong > 1.0,
            "attention in pieces at least twice as fast as under a dense mask": ratio >= 2.0,
        },
        measured={
            "tokens in the row": sum(lengths),
            "share of padded": sum(lengths) / padded,
            "largest gap of logits": gap,
            "largest logit": range_,
            "seconds, packed row": seconds,
            "attention, times faster than under a mask": ratio,
        },
        control={"padded tokens": padded, "largest gap of logits without segments": wrong},
        note=f"{len(texts)} passages of tinyshakespeare, one thread, float32. Padded tokens are counted, not run. In "
        "float32 sums over 30 layers differ by more than 1e-4 itself, whatever the division: the range is the measure.",
    )


def _attention_times(lab: Lab, length: int, lengths: list[int]) -> tuple[float, float, float]:
    """Return how many times faster a layer's attention is in pieces, and both times in seconds."""
    draws = torch.Generator().manual_seed(lab.seed)
    q = torch.randn(1, length, 9, 64, generator=draws)
    k = torch.randn(1, length, 3, 1, 64, generator=draws)
    q = q.unflatten(2, (3, 3))
    bias = BlockDiagonalCausalMask.from_seqlens(lengths)
    dense = bias.materialize((1, 1, length, length))
    times: dict[str, list[float]] = {"mask": [], "pieces": []}
    for _ in range(lab.pick(smoke=1, small=5)):
        for name, hidden in (("mask", dense), ("pieces", bias)):
            start = time.perf_counter()
            memory_efficient_attention(q, k, k, hidden)
            times[name].append(time.perf_counter() - start)
    masked, pieces = (sorted(found)[len(found) // 2] for found in times.values())
    return masked / pieces, masked, pieces
