"""Multi-query attention: all query heads share one key and one value head, and decoding reads h times less."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from paperworks.lab import Beats, Lab, Paper, Verdict, Within
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
    equation=(
        r"y = \sum_{h} \operatorname{softmax}\left(\tfrac{x W^Q_h (M W^K)^\top}{\sqrt{d_k}}\right) M W^V\, W^O_h, "
        r"\quad W^K, W^V \text{ without } h"
    ),
    usage="""
import torch
from paperworks.nn import Attention

for heads in (None, 8, 1):                                # multi-head, grouped, multi-query
    layer = Attention(heads=16, kv_heads=heads).build(1024)
    held = layer.new_cache(1, 2048, torch.float16, torch.device("cpu"))
    print(f"{heads or 16:>2} key and value heads: {held.bytes() / 2**20:.1f} MiB a layer for 2,048 tokens")
""",
)

DIM, DEPTH, HEADS, HIDDEN = 96, 2, 6, 256


def _spec(kv_heads: int | None, heads: int = HEADS) -> Decoder:
    """A small model; with fewer heads its MLP is wider, so that all have as many parameters."""
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
    "Decoding with a long cache takes at most half the time",
    paper="Table 3: 46 against 3.8 microseconds a token for the decoder of a translation model",
    control="multi-head attention, which reads a key and a value for every head",
)
def decodes_faster(lab: Lab) -> Verdict:
    """Time attention over a cache, 32 rows at once, on one thread: the smallest of many, taken in turn."""
    rows, lengths = lab.pick(smoke=(2, (16, 32)), small=(32, (128, 256, 512, 1024)))
    rounds = lab.pick(smoke=2, small=12)
    kv_heads = {"multi-head": 8, "8 heads in 2 groups": 2, "multi-query": 1}

    @cache
    def timed(seed: int) -> dict[str, dict[str, float | list[float]]]:
        """Metrics of each kind; measured in turn, so that a busy moment hits all of them alike."""
        found: dict[str, dict[str, float | list[float]]] = {}
        curves: dict[str, list[float]] = {name: [] for name in kv_heads}
        for length in lengths:
            steps = {
                name: _Decoding(count, rows, length, rounds, lab.generator(seed)) for name, count in kv_heads.items()
            }
            seconds: dict[str, list[float]] = {name: [] for name in kv_heads}
            with lab.threads(1), torch.no_grad():
                for _ in range(rounds):
                    for name, step in steps.items():
                        seconds[name].append(step())
            for name, step in steps.items():
                curves[name].append(1e3 * min(seconds[name]))
                found[name] = {
                    "milliseconds": curves[name][-1],
                    "bytes held": float(step.held.bytes()),
                    "milliseconds a token": curves[name],
                    "tokens in the cache": [float(size) for size in lengths],
                }
        return found

    def arm(name: str) -> Callable[[int], dict[str, float | list[float]]]:
        return lambda seed: timed(seed)[name]

    verdict = lab.compare(
        arms={name: arm(name) for name in kv_heads},
        # The catalogue's margin for a CPU, where arithmetic costs more beside memory than on a TPU.
        main=Beats("multi-query", "multi-head", on="milliseconds", by_ratio=0.5, lower=True),
        also=[Beats("multi-query", "multi-head", on="bytes held", by_ratio=1 - 1 / 8, lower=True)],
        seeds=3,
        note=f"One token of width 512 against {lengths[-1]:,} in the cache, {rows} rows, 8 heads, the four projections "
        "included; smallest of the rounds, the kinds in turn. Only ratios of these times say something.",
    )
    lab.curves("milliseconds a token", x="tokens in the cache", name="decoding", title="One token, width 512")
    return verdict


class _Decoding:
    """Attention with a filled cache; a call takes one step and gives its seconds."""

    def __init__(self, kv_heads: int, rows: int, length: int, rounds: int, draws: torch.Generator) -> None:
        self.module: nn.Module = Attention(heads=8, kv_heads=kv_heads).build(512)
        self.held = self.module.new_cache(rows, length + rounds, torch.float32, torch.device("cpu"))  # type: ignore[operator]
        self.held.keys.normal_(generator=draws)
        self.held.values.normal_(generator=draws)
        self.cache = Cache([self.held], length + rounds)
        self.cache.length = length
        self.x = torch.randn(rows, 1, 512, generator=draws)

    def __call__(self) -> float:
        placement = Placement(cache=self.cache).resolve(len(self.x), 1, self.x.device).at(self.held)
        began = time.perf_counter()
        self.module(self.x, placement)
        return time.perf_counter() - began


@paper.claim(
    "With as many parameters it loses little, where one head that reads as little loses more",
    paper="Table 1: dev ln perplexity 1.424 (multi-head), 1.439 (multi-query), 1.518 (a single head)",
    control="attention with a single head, which holds as many bytes; all of as many parameters",
)
def learns_nearly_as_well(lab: Lab) -> Verdict:
    """Train on characters of Shakespeare, equal steps, MLPs widened to equal size."""
    steps = lab.pick(smoke=3, small=430)
    specs = {"multi-query": _spec(1), "single head": _spec(1, heads=1), "multi-head": _spec(None)}

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"loss": held_out_loss(lab, trained(lab, specs[name], steps, seed, name))}

    verdict = lab.compare(
        arms={name: arm(name) for name in specs},
        # Half of the distance in Table 1, 0.079.
        main=Beats("multi-query", "single head", on="loss", by=0.04, lower=True),
        # In the paper multi-query loses 0.015 nats, a fifth of what it gains on a single head.
        also=[Within("multi-query", "multi-head", on="loss", by=0.015, lower=True)],
        seeds=2,
        note=f"{DEPTH} layers of width {DIM}, {HEADS} heads, {steps} steps of 1,024 characters of tinyshakespeare; "
        "nats a character on the last tenth. After 170 steps, an earlier design, one head is as good as eight: heads "
        "come to differ later.",
    )
    lab.points("loss", title="Held-out loss at equal parameters")
    return verdict
