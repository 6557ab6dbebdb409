"""Tree attention: a long cache spread over processes, of which only small partial results travel."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.nn import functional

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, Cache, Placement
from paperworks.nn.attention.cache import KeyValueCache
from paperworks.nn.attention.reference.tiled import EMPTY, Partial, merge
from paperworks.nn.attention.reference.tree import (
    Exchange,
    TreeAttention,
    energy,
    partial_attention,
    reduce_ring,
    reduce_tree,
)
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="tree-attention",
    title="Tree Attention: Topology-Aware Decoding for Long-Context Attention on GPU Clusters",
    authors="Shyam, Pilault, Shepperd, Anthony, Millidge",
    year=2024,
    ref="arXiv:2408.04093",
    family="attention",
    summary=(
        "Attention is the gradient of a log-sum-exp, which is associative: processes that hold parts of a long cache "
        "reduce over a tree, and what they send does not grow with the length."
    ),
    implements=(
        "paperworks.nn.attention.reference.tree.TreeAttention",
        "paperworks.nn.attention.reference.tree.partial_attention",
        "paperworks.nn.attention.reference.tree.reduce_tree",
        "paperworks.nn.attention.reference.tree.reduce_ring",
        "paperworks.nn.attention.reference.tree.all_reduce",
        "paperworks.nn.attention.reference.tree.energy",
    ),
    equation=(
        r"F(\zeta) = \sum_a \log \sum_j \exp(q_a \cdot k_j + \zeta \cdot v_j), \quad \left. \frac{\partial "
        r"F}{\partial \zeta} \right|_{\zeta = 0} = \operatorname{Attention}(q, K, V)"
    ),
    usage="""
import torch
from paperworks.nn.attention.reference.tree import Exchange, partial_attention, reduce_tree

q = torch.randn(1, 4, 1, 16, dtype=torch.float64)  # (batch, heads, queries, channels)
k, v = torch.randn(2, 1, 4, 4096, 16, dtype=torch.float64)
parts = [partial_attention(q, *part) for part in zip(k.chunk(8, 2), v.chunk(8, 2), strict=True)]  # of 8 processes
exchange = Exchange()
out = reduce_tree(parts, exchange)
print(exchange.rounds, "rounds,", exchange.sent, "numbers sent")
""",
)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _drawn(seed: int, *shape: int, count: int = 3) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=draws, dtype=torch.float64) for _ in range(count)]


@paper.claim(
    "Partial results merge in any order, over any division, and attention is the gradient of the energy",
    paper="Sections 3 and 4: attention as the gradient of F; associativity of log-sum-exp and max",
    kind="exact",
    control="log-sum-exps added up, and outputs averaged",
)
def any_tree_gives_attention(lab: Lab) -> Verdict:
    """Cut 50 keys in every number of shards, empty ones among them, and reduce in several ways, in float64."""
    query, key, value = _drawn(lab.seed, 2, 4, 50, 16)
    query = query[:, :, :3]
    whole = functional.scaled_dot_product_attention(query, key, value)
    worst = 0.0
    for workers in (*range(1, 10), 60):  # 60: more workers than keys
        shards = list(zip(key.tensor_split(workers, 2), value.tensor_split(workers, 2), strict=True))
        partials = [partial_attention(query, *shard) for shard in shards]
        forwards = partials[0]
        for partial in partials[1:]:
            forwards = merge(forwards, partial)
        for found in (reduce_tree(partials), reduce_tree(partials[::-1]), forwards, *reduce_ring(query, shards)):
            worst = max(worst, _gap(found.out, whole))
    a, b, c = (partial_attention(query, key[:, :, i : i + 10], value[:, :, i : i + 10]) for i in (0, 10, 20))
    nothing = Partial(torch.zeros_like(a.out), torch.full_like(a.log_sum, EMPTY))
    sides = [(merge(merge(a, b), c), merge(a, merge(b, c))), (merge(a, b), merge(b, a)), (merge(a, nothing), a)]
    laws = max(_gap(one, other) for pair in sides for one, other in zip(*pair, strict=True))
    source = torch.zeros_like(query).requires_grad_()
    (slope,) = torch.autograd.grad(energy(query, key, value, source), source)
    averaged = _gap(torch.stack([a.out, b.out, c.out]).mean(0), merge(merge(a, b), c).out)
    return lab.judge(
        checks={
            "equal to full attention, to 1e-12": worst < 1e-12,
            "associative, commutative, with (0, -inf) as its identity, to 1e-12": laws < 1e-12,
            "the gradient of the energy at 0 is attention, to 1e-12": _gap(slope, whole) < 1e-12,
            "the mean of partial outputs is not attention": averaged > 0.01,
        },
        measured={"largest difference": worst, "of the laws": laws, "of the gradient": _gap(slope, whole)},
        control={"largest difference of plain means": averaged},
    )


@paper.claim(
    "What a worker sends does not grow with the length, and rounds grow with the logarithm of the workers",
    paper="Section 6: communication volume and steps against ring attention",
    kind="exact",
    control="ring attention, which sends keys and values round",
)
def sends_little(lab: Lab) -> Verdict:
    """Count the numbers that simulated workers send for one token, for several lengths and numbers of workers."""
    batch, heads, dim = 2, 4, 16
    lengths, crowd = (64, 256, 1024), (2, 3, 4, 8, 16)
    tree: dict[tuple[int, int], Exchange] = {}
    ring: dict[tuple[int, int], Exchange] = {}
    for length in lengths:
        query, key, value = _drawn(lab.seed, batch, heads, length, dim)
        query = query[:, :, :1]
        for workers in crowd:
            shards = list(zip(key.tensor_split(workers, 2), value.tensor_split(workers, 2), strict=True))
            tree[length, workers], ring[length, workers] = Exchange(), Exchange()
            reduce_tree([partial_attention(query, *shard) for shard in shards], tree[length, workers])
            reduce_ring(query, shards, ring[length, workers])
    width = heads * dim
    expected_tree = {p: 2 * (p - 1) * batch * (width + heads) for p in crowd}
    expected_ring = {(t, p): (p - 1) * 2 * batch * t * width for t, p in ring}
    longest = lengths[-1]
    with lab.figure("sent") as figure:
        axes = figure.subplots()
        axes.plot(lengths, [ring[t, 8].sent / 8 for t in lengths], marker="o", color=CONTROL, label="ring")
        axes.plot(lengths, [tree[t, 8].sent / 8 for t in lengths], marker="o", color=COLORS[0], label="tree")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, list(map(str, lengths)))
        axes.set(title="Numbers a worker sends for one token, 8 workers", xlabel="keys", ylabel="numbers")
        axes.legend()
    return lab.judge(
        checks={
            "tree: 2 (p - 1) / p of output and weights, whatever the length": all(
                found.sent == expected_tree[workers] for (_, workers), found in tree.items()
            ),
            "ring: (p - 1) / p of 2 b t d": all(found.sent == expected_ring[key] for key, found in ring.items()),
            "rounds: ceil(log2 p) each way, against p - 1": all(
                tree[key].rounds == 2 * math.ceil(math.log2(key[1])) and ring[key].rounds == key[1] - 1 for key in tree
            ),
        },
        measured={
            "workers": list(crowd),
            "numbers a worker sends": [tree[longest, p].sent / p for p in crowd],
            "rounds": [tree[longest, p].rounds for p in crowd],
        },
        control={
            "numbers a worker sends": [ring[longest, p].sent / p for p in crowd],
            "rounds": [ring[longest, p].rounds for p in crowd],
        },
        note=f"{longest} keys, {heads} heads of {dim} channels, {batch} rows. One number less than the catalogue's "
        "count for each head: a merge of two needs the log-sum-exp alone, an all-reduce its maximum and sum. With a "
        "tree the mean worker sends 2 (p - 1) / p of a message, the root more.",
    )


def rebuilt(spec: Decoder, weights: dict[str, Tensor], mixer: type[Attention], context: int) -> DecoderModel:
    """Return a model of these weights for texts of another length, its attention as it was or spread."""
    assert isinstance(spec.block, Block)
    assert isinstance(spec.block.mixer, Attention)
    attention = TreeAttention.of(spec.block.mixer) if mixer is TreeAttention else spec.block.mixer
    with torch.device("meta"):
        twin = replace(spec, context=context, block=replace(spec.block, mixer=attention)).build()
    twin.load_state_dict(weights, assign=True)
    return twin.eval()


def filled(model: DecoderModel, length: int, room: int, seed: int) -> Cache:
    """Return a cache that holds drawn keys and values of `length` tokens; the same ones however it is spread."""
    cache = model.new_cache(1, length + room)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, KeyValueCache)
        draws = torch.Generator().manual_seed(1000 * seed + index)
        shape = (1, layer.keys.shape[1], length, layer.keys.shape[3])
        keys, values = (torch.randn(shape, generator=draws, dtype=torch.float32) for _ in range(2))
        layer.extend(keys, values, 0)
    cache.length = length
    return cache


@torch.no_grad()
def _decode(model: DecoderModel, cache: Cache, tokens: int) -> tuple[list[int], Tensor]:
    """Return the tokens that are likeliest one after the other, and their logits."""
    said, logits = [1], []
    for _ in range(tokens):
        logits.append(model(torch.tensor([said[-1:]]), Placement(cache=cache))[0, -1])
        said.append(int(logits[-1].argmax()))
    return said[1:], torch.stack(logits)


def _worker(rank: int, workers: int, spec: Decoder, length: int, tokens: int, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(USE_LIBUV="0")
    store = dist.FileStore(str(Path(folder) / "store"), workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(minutes=4))
    try:
        weights = torch.load(Path(folder) / "weights.pt", weights_only=True, mmap=True)  # held once for all
        spreading = rebuilt(spec, weights, TreeAttention, length + tokens)
        cache = filled(spreading, length, tokens, seed)
        said, logits = _decode(spreading, cache, tokens)
        torch.save({"said": said, "logits": logits, "bytes": cache.bytes()}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@paper.claim(
    "Four processes that hold a quarter of the cache each say what one with all of it says",
    paper="Section 6: the same outputs as full attention, decoding with the cache of a long text over many devices",
    kind="exact",
    control="one process, which holds four times as much; a quarter of the cache alone",
)
def four_processes_agree(lab: Lab) -> Verdict:
    """Decode 20 tokens with SmolLM2 from a cache of 16,384 drawn keys and values, under gloo."""
    workers, length, tokens = 4, lab.pick(smoke=100, small=16_384), lab.pick(smoke=3, small=20)
    model = smollm2(lab, smoke_depth=2).double().cpu()
    spec, weights = model.spec, model.state_dict()
    assert isinstance(spec, Decoder)
    with tempfile.TemporaryDirectory() as folder, lab.threads(1):
        torch.save(weights, Path(folder) / "weights.pt")
        given: tuple[Any, ...] = (workers, spec, length, tokens, lab.seed, folder)
        multiprocessing.start_processes(_worker, given, nprocs=workers, start_method="spawn")
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(workers)]
    with lab.threads(1):
        alone = rebuilt(spec, weights, Attention, length + tokens)
        cache = filled(alone, length, tokens, lab.seed)
        said, logits = _decode(alone, cache, tokens)
        quarter = _decode(alone, filled(alone, length // workers, tokens, lab.seed), tokens)[1]
    worst = max(_gap(each["logits"], logits) for each in found)
    shares = [each["bytes"] / cache.bytes() for each in found]
    return lab.judge(
        checks={
            "logits of all four within 1e-5": worst < 1e-5,
            "the same tokens": all(each["said"] == said for each in found),
            "a quarter of the bytes each, to 1%": all(abs(4 * share - 1) < 0.01 for share in shares)
            or lab.scale == "smoke",
            "a quarter of the cache alone says something else": _gap(quarter[:1], logits[:1]) > 1e-2,
        },
        measured={
            "largest difference of logits": worst,
            "range of logits": float(logits.max() - logits.min()),
            "share of the bytes": shares,
            "tokens": tokens,
        },
        control={
            "bytes in one process": cache.bytes(),
            "largest difference of logits, a quarter alone": _gap(quarter[:1], logits[:1]),
        },
        note=f"{length:,} tokens in the cache: keys and values are drawn, reading so many would take minutes.",
    )
