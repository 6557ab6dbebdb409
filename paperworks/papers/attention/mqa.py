"""Multi-query attention: all query heads share one key and one value head, and decoding reads h times less."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, count_parameters
from paperworks.nn import Attention, Cache, GatedMLP, Placement
from paperworks.testbeds.characters import character_llama, held_out_loss, trained

paper = Paper(
    key="mqa",
    title="Fast Transformer Decoding: One Write-Head is All You Need",
    authors="Shazeer",
    year=2019,
    ref="arXiv:1911.02150",
    family="attention",
    summary=(
        "Decoding one token at a time is bound by reading the keys and values of all earlier ones; if all heads share "
        "one key and one value head there is h times less to read, and hardly anything is lost."
    ),
    implements=("paperworks.nn.attention.attention.Attention",),
)

DIM, DEPTH, HEADS, HIDDEN = 96, 4, 6, 256


def _spec(kv_heads: int | None, heads: int = HEADS) -> Decoder:
    """Return a small model; with fewer heads its MLP is wider, so that all have as many parameters."""
    base = character_llama(dim=DIM, depth=DEPTH, heads=HEADS, hidden=HIDDEN)
    assert isinstance(base.block, Block)
    assert isinstance(base.block.mixer, Attention)
    size = DIM // HEADS
    saved = 2 * DIM * size * (HEADS - (heads if kv_heads is None else kv_heads) + HEADS - heads)
    wider = GatedMLP(hidden=HIDDEN + saved // (3 * DIM))
    mixer = replace(base.block.mixer, heads=heads, kv_heads=kv_heads, head_dim=size)
    return replace(base, block=replace(base.block, mixer=mixer, feedforward=wider))


@paper.claim(
    "One shared head is multi-head attention whose keys and values agree, with a cache h times smaller",
    paper="Section 3: the multi-query variant; Section 3.1: memory access 1/d + n/(d h) + 1/b",
    kind="exact",
    control="multi-head attention with heads of its own",
)
@torch.no_grad()
def is_attention_with_equal_heads(lab: Lab) -> Verdict:
    """Repeat the shared head in all others and compare outputs; count parameters and bytes."""
    heads, dim = 8, 64
    torch.manual_seed(lab.seed)
    shared = Attention(heads=heads, kv_heads=1).build(dim).double()
    wide, own = (Attention(heads=heads).build(dim).double() for _ in range(2))
    wide.load_state_dict(
        {
            name: tensor.repeat(heads, 1) if name.startswith(("key", "value")) else tensor
            for name, tensor in shared.state_dict().items()
        }
    )
    own.load_state_dict(wide.state_dict() | {"key.weight": torch.randn(dim, dim, dtype=torch.float64)})
    x = torch.randn(2, 20, dim, dtype=torch.float64)

    def out(module: torch.nn.Module) -> Tensor:
        result: Tensor = module(x, Placement().resolve(2, 20, x.device))
        return result

    same, other = (float((out(shared) - out(module)).abs().max()) for module in (wide, own))
    cpu = torch.device("cpu")
    held = [module.new_cache(1, 1000, torch.float32, cpu).bytes() for module in (wide, shared)]  # type: ignore[operator]
    saved = count_parameters(wide) - count_parameters(shared)
    matched = [count_parameters(spec) for spec in (_spec(None), _spec(1), _spec(1, heads=1))]
    return lab.judge(
        checks={
            "equal to heads that repeat the shared one, to 1e-12": same < 1e-12,
            "the cache is 8 times smaller": held[0] == heads * held[1],
            "2 d (h - 1) d_head parameters fewer": saved == 2 * dim * (heads - 1) * dim // heads,
            "a wider MLP makes up for them, to 1%": max(matched) / min(matched) < 1.01,
            "heads of their own are another function": other > 1e-3,
        },
        measured={"largest difference": same, "bytes held": held, "parameters": matched},
        control={"largest difference": other},
    )


@paper.claim(
    "Decoding with a long cache is several times faster",
    paper="Table 3: 46 against 3.8 microseconds a token for the decoder of a translation model",
    control="multi-head attention",
)
@torch.no_grad()
def decodes_faster(lab: Lab) -> Verdict:
    """Time attention over a cache of 1,024 tokens, 32 rows at once: one thread, the smallest of many."""
    rows, lengths = lab.pick(smoke=(2, (16, 32)), small=(32, (128, 256, 512, 1024)))
    seconds = {
        name: [_seconds(lab, Attention(heads=8, kv_heads=kv_heads), rows, length) for length in lengths]
        for name, kv_heads in (("multi-head", None), ("8 heads in 2 groups", 2), ("multi-query", 1))
    }
    with lab.figure("decoding") as figure:
        axes = figure.subplots()
        for (name, values), color in zip(seconds.items(), (CONTROL, COLORS[1], COLORS[0]), strict=True):
            axes.plot(lengths, [1e3 * value for value in values], marker="o", color=color, label=name)
        axes.set(title="One token, 32 rows, width 512", xlabel="tokens in the cache", ylabel="milliseconds", ylim=0)
        axes.legend()
    ratio = seconds["multi-head"][-1] / seconds["multi-query"][-1]
    return lab.judge(
        checks={"at least twice as fast at the longest": ratio >= 2},
        measured={"multi-head's time over multi-query's": ratio, "seconds": seconds["multi-query"]},
        control={"seconds, multi-head": seconds["multi-head"]},
        note="The whole layer, its four projections included. A ratio of one machine's timings.",
    )


def _seconds(lab: Lab, spec: Attention, rows: int, length: int) -> float:
    torch.manual_seed(0)
    module, cpu = spec.build(512), torch.device("cpu")
    repeats = lab.pick(smoke=2, small=12)
    held = module.new_cache(rows, length + repeats, torch.float32, cpu)  # type: ignore[operator]
    held.keys.normal_()
    held.values.normal_()
    cache = Cache([held], length + repeats)
    cache.length = length
    x, taken = torch.randn(rows, 1, 512), []
    with lab.threads(1):
        for _ in range(repeats):
            placement = Placement(cache=cache).resolve(rows, 1, cpu).at(held)
            began = time.perf_counter()
            module(x, placement)
            taken.append(time.perf_counter() - began)
    return min(taken)


@paper.claim(
    "With as many parameters it learns nearly as well",
    paper="Table 1: dev ln perplexity 1.424 and 1.439; with one head of the size that saves as much, 1.518",
    control="a single head, which reads as little; multi-head attention; all of as many parameters",
)
def learns_nearly_as_well(lab: Lab) -> Verdict:
    """Train on characters of Shakespeare, equal steps, MLPs widened to equal size."""
    steps = lab.pick(smoke=3, small=700)
    losses = {}
    for name, spec in (("multi-head", _spec(None)), ("multi-query", _spec(1)), ("single head", _spec(1, heads=1))):
        losses[name] = held_out_loss(lab, trained(lab, spec, steps, lab.seed, name))
    return lab.judge(
        checks={
            "within 0.05 nats of multi-head attention": losses["multi-query"] <= losses["multi-head"] + 0.05,
            "better than a single head": losses["multi-query"] < losses["single head"],
        },
        measured={"held-out loss": losses["multi-query"], "steps": steps},
        control={
            "held-out loss, single head": losses["single head"],
            "held-out loss, multi-head": losses["multi-head"],
        },
    )
