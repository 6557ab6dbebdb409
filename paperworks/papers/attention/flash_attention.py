"""FlashAttention: exact attention tile by tile, so that the matrix of weights never exists."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS
from paperworks.nn.attention.reference.tiled import Tiles, Traffic, standard_traffic, tiled_attention

paper = Paper(
    key="flash-attention",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    authors="Dao, Fu, Ermon, Rudra, Re",
    year=2022,
    ref="arXiv:2205.14135",
    family="attention",
    summary=(
        "Softmax can be taken over tiles of keys if a running maximum and sum are kept and the output rescaled; "
        "weights stay in fast memory, are computed again for the gradient, and memory is linear in length."
    ),
    implements=(
        "paperworks.nn.attention.reference.tiled.tiled_attention",
        "paperworks.nn.attention.reference.tiled.Tiles",
    ),
    equation=(
        r"m' = \max(m, \max S), \; \ell' = e^{m - m'} \ell + \sum e^{S - m'}, \; o' = \frac{e^{m - m'} \ell \, o + "
        r"e^{S - m'} V}{\ell'}"
    ),
    usage="""
import torch
from paperworks.nn import Attention, Placement
from paperworks.nn.attention.reference.tiled import Tiles, tiled_attention

q, k, v = torch.randn(3, 1000, 64, dtype=torch.float64)
out, log_sum_exp = tiled_attention(q, k, v, causal=True, tiles=Tiles(128, 128))  # the algorithm, to read
plain = (q @ k.mT / 8).masked_fill(torch.ones(1000, 1000).triu(1).bool(), -torch.inf).softmax(-1) @ v
print("largest difference from plain attention:", float((out - plain).abs().max()))
x = torch.randn(1, 1000, 256)  # a model uses torch's own kernel of it, on a CPU and on a GPU
print(tuple(Attention(heads=4).build(256)(x, Placement().resolve(1, 1000, x.device)).shape))
""",
)


def _drawn(lab: Lab, *shape: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draws = lab.generator(lab.seed)
    return [torch.randn(*shape, generator=draws, dtype=dtype) for _ in range(count)]


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[-2] - query.shape[-2])
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ value


def _unrescaled(query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """The control: tiles whose outputs are added up without rescaling what came before."""
    largest = query.new_full(query.shape[:-1], -math.inf)
    total, out = torch.zeros_like(largest), torch.zeros_like(query)
    for start in range(0, key.shape[-2], size):
        scores = query @ key[..., start : start + size, :].transpose(-1, -2) / query.shape[-1] ** 0.5
        largest = torch.maximum(largest, scores.amax(-1))
        weights = torch.exp(scores - largest[..., None])
        total, out = total + weights.sum(-1), out + weights @ value[..., start : start + size, :]
    return out / total[..., None]


@paper.claim(
    "Any tiles give exactly attention, and its gradients",
    paper="Theorem 1: Algorithm 1 returns softmax(QK^T)V; Appendix B: the backward pass recomputes the weights",
    kind="exact",
    control="tiles whose running output is not rescaled",
)
def tiles_are_exact(lab: Lab) -> Verdict:
    """Compare with plain attention in float64: causal or not, uneven tails, more keys than queries."""
    worst, worst_gradient, tried = 0.0, 0.0, 0
    for causal in (False, True):
        for tiles in (Tiles(1, 1), Tiles(7, 5), Tiles(16, 64), Tiles(128, 128)):
            for queries, keys in ((33, 33), (20, 50)):
                cut = zip(_drawn(lab, 2, 2, 64, 16), (queries, keys, keys), strict=True)
                given = [tensor[..., :length, :] for tensor, length in cut]
                ours, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
                found = tiled_attention(ours[0], ours[1], ours[2], causal=causal, tiles=tiles)[0]
                expected = _plain(theirs[0], theirs[1], theirs[2], causal)
                upstream = _drawn(lab, *expected.shape, count=1)[0]
                (found * upstream).sum().backward()
                (expected * upstream).sum().backward()
                worst = max(worst, float((found - expected).detach().abs().max()))
                pairs = zip(ours, theirs, strict=True)
                worst_gradient = max(worst_gradient, *(float((a.grad - b.grad).abs().max()) for a, b in pairs))  # type: ignore[operator]
                tried += 1
    query, key, value = _drawn(lab, 2, 2, 64, 16)
    wrong = float((_unrescaled(query, key, value, 16) - _plain(query, key, value, False)).abs().max())
    large = tiled_attention(1e4 * query.float(), key.float(), value.float())[0]
    return lab.judge(
        checks={
            "outputs equal to 1e-12": worst < 1e-12,
            "gradients equal to 1e-12": worst_gradient < 1e-12,
            "scores of 10,000 stay finite": bool(torch.isfinite(large).all()),
            "without rescaling the output is wrong": wrong > 1e-2,
        },
        measured={"largest difference": worst, "of gradients": worst_gradient, "combinations tried": tried},
        control={"largest difference without rescaling": wrong},
    )


@paper.claim(
    "Traffic to slow memory falls with the size of fast memory, as N^2 d^2 / M",
    paper="Theorem 2: Theta(N^2 d^2 / M) against Theta(N d + N^2) for standard attention",
    kind="exact",
    control="attention whose matrices of scores and weights live in slow memory",
)
@torch.no_grad()
def traffic_is_the_papers(lab: Lab) -> Verdict:
    """Count what the algorithm moves, for four sizes of fast memory and three lengths."""
    dim = 64
    memories = (4096, 8192, 16384, 32768)
    lengths = lab.pick(smoke=(128, 256), small=(512, 1024, 2048))
    moved: dict[int, list[int]] = {}
    for length in lengths:
        zeros = torch.zeros(length, dim)
        moved[length] = []
        for memory in memories:
            traffic = Traffic()
            tiled_attention(zeros, zeros, zeros, tiles=Tiles.fitting(memory, dim), traffic=traffic)
            moved[length].append(traffic.total)
    longest = lengths[-1]
    # the part of the count that the theorem is about: what every tile of keys moves
    by_tiles = [total - 2 * longest * dim for total in moved[longest]]
    product = [total * memory for total, memory in zip(by_tiles, memories, strict=True)]
    spread = max(product) / min(product)
    growth = moved[longest][0] / moved[lengths[-2]][0]
    plain = standard_traffic(longest, longest, dim)
    with lab.figure("traffic") as figure:
        axes = figure.subplots()
        for color, length in zip(COLORS, lengths, strict=False):
            axes.plot(memories, moved[length], marker="o", color=color, label=f"{length} tokens")
            axes.axhline(standard_traffic(length, length, dim), color=color, linestyle=":", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(memories, [f"{memory:,}" for memory in memories])
        axes.set(title="Numbers moved; dotted: standard attention", xlabel="numbers fast memory holds", ylabel="moved")
        axes.legend()
    return lab.judge(
        checks={
            "traffic times memory is constant to 1%": spread < 1.01,
            "twice the length moves four times as much, to 5%": abs(growth / 4 - 1) < 0.05,
            "less than standard attention, where fast memory holds 4 d^2": moved[longest][2] < plain,
        },
        measured={
            "numbers moved, longest": moved[longest],
            "fast memory": list(memories),
            "traffic x memory, largest / smallest": spread,
        },
        control={"numbers moved by standard attention": plain},
        note="At 4,096 numbers (16 keys a tile) it moves more than standard attention: M must exceed some d^2.",
    )


@paper.claim(
    "Extra memory is a small part of the matrix of weights",
    paper="Section 3.1 and Figure 3: memory linear in length, up to 20 times less than exact baselines",
    control="attention that stores its weights",
)
@torch.no_grad()
def memory_is_linear(lab: Lab) -> Verdict:
    """Measure what the process holds beyond its inputs at 8,192 tokens (64 channels, float32)."""
    length, dim = lab.pick(smoke=512, small=8192), 64

    def arm(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            query, key, value = torch.randn(3, length, dim, generator=lab.generator(seed)).unbind()
            found: list[Tensor] = []
            extra = _peak(lambda: found.append(attend(query, key, value)))
            fused = functional.scaled_dot_product_attention(query[None], key[None], value[None])[0]
            return {
                "extra memory / matrix of weights": extra / (4 * length**2),
                "difference from torch's kernel": float((found[0] - fused).abs().max()),
            }

        return measures

    verdict = lab.compare(
        arms={
            "tiles": arm(lambda q, k, v: tiled_attention(q, k, v, tiles=Tiles(256, 256))[0]),
            "plain": arm(lambda q, k, v: _plain(q, k, v, False)),
        },
        main=Beats("tiles", "plain", on="extra memory / matrix of weights", by=0.95, lower=True),
        also=[
            AtMost("tiles", 0.05, on="extra memory / matrix of weights"),
            AtMost("tiles", 1e-6, on="difference from torch's kernel"),
        ],
        seeds=3,
        note="The process's resident memory, sampled every millisecond.",
    )
    lab.points("extra memory / matrix of weights", name="memory", title="Memory beyond the inputs, of the matrix")
    return verdict


@paper.claim(
    "Attention by the kernel of it that models here use is faster than attention that stores its weights",
    paper="Abstract: up to 3 times faster training of GPT-2; the speed comes from not moving the matrix",
    control="the same product, softmax and product as three operations",
)
@torch.no_grad()
def is_faster(lab: Lab) -> Verdict:
    """Time torch's CPU kernel of the algorithm, which `Attention` calls, and the plain operations, taken in turn."""
    length, rounds = lab.pick(smoke=64, small=2048), lab.pick(smoke=1, small=7)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "tiles": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "plain": lambda q, k, v: _plain(q, k, v, True),
    }

    @cache
    def timed(seed: int) -> dict[str, float]:
        query, key, value = torch.randn(3, 1, 8, length, 64, generator=lab.generator(seed)).unbind()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with lab.threads(1):
            for _ in range(rounds):
                for name, attend in ways.items():
                    began = time.perf_counter()
                    attend(query, key, value)
                    seconds[name].append(time.perf_counter() - began)
        return {name: 1000 * min(found) for name, found in seconds.items()}

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"milliseconds": timed(seed)[name]}

    return lab.compare(
        arms={name: arm(name) for name in ways},
        main=Beats("tiles", "plain", on="milliseconds", by_ratio=0.5, lower=True),
        seeds=3,
        note=f"{length:,} tokens, 8 heads of 64 channels, causal, forward only, one thread; the smallest of {rounds} "
        "times. Only the ratio says something. A GPU, where the paper's numbers are from, was not at hand.",
    )


def _peak(work: Callable[[], Any]) -> int:
    """Return by how many bytes the process grew at most while `work` ran."""
    page = 4096
    ended = threading.Event()
    largest = [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page

    def watch() -> None:
        while not ended.is_set():
            largest[0] = max(largest[0], resident())
            time.sleep(0.001)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return max(largest[0] - before, 0)
