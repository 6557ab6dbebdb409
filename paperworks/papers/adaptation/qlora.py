"""QLoRA: fine-tune adapters through a base of four bits a weight, and lose nothing by it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paperworks import adapt, api, compress, train
from paperworks.core.linear import weight_of
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.models import DecoderModel
from paperworks.papers.adaptation._play import lesson
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="qlora",
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
    year=2023,
    ref="arXiv:2305.14314",
    family="adaptation",
    summary=(
        "The base is held in four bits and decoded layer by layer when it is used; gradients pass through it to "
        "low-rank adapters on every linear layer, which learn away what the rounding lost."
    ),
    implements=(
        "paperworks.adapt.apply.apply",
        "paperworks.compress.formats.fourbit.NF4",
        "paperworks.compress.linear.CompressedLinear",
        "paperworks.train.optim.paged_adamw.PagedAdamW",
        "paperworks.train.recomputation.recompute",
    ),
    equation=r"Y = X \operatorname{dequant}(\operatorname{dequant}(c_1, c_2), W^{\mathrm{NF4}}) + X L_1 L_2",
    usage="""
import torch
from paperworks import adapt, compress

model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
compress.apply(model, compress.NF4(double_quantization=True))
print("bits a weight:", round(compress.report(model).bits_per_weight, 3))
adapt.apply(model, adapt.LoRA(rank=8), "all-linear")  # the base stays as it is, packed
model(torch.randn(4, 512)).square().mean().backward()
trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
print("gradients:", trained)
""",
    notes="A dozen steps on a play stand in for instruction tuning and MMLU; the paper's own sizes need a GPU.",
)

FORMAT = compress.NF4(block=64, double_quantization=True)
LOSS = "held-out loss"
RATE = 1e-3


def _with_adapters(lab: Lab, model: nn.Module, rank: int = 16) -> nn.Module:
    torch.manual_seed(lab.seed)
    return adapt.apply(model, adapt.LoRA(rank=rank, alpha=16), "all-linear")


@paper.claim(
    "Adapters trained through SmolLM2 in four bits do as well as adapters on the full weights",
    paper="Table 4: MMLU of LLaMA with adapters on NF4 + DQ 53.1, on BFloat16 53.0, on FP4 52.2 (means over models)",
    control="the base in four bits as it is, without adapters; and the adapters of the full weights put on it",
    reach="real",
)
def matches_full_precision(lab: Lab) -> Verdict:
    """Teach SmolLM2 a play by rank-16 adapters on every linear layer, as loaded and in four bits, on the same text."""
    play = lesson(lab, steps=8)
    packed = compress.apply(copy.deepcopy(play.model), FORMAT, "all-linear")

    def taught(base: nn.Module, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = adapt.apply(copy.deepcopy(base), adapt.LoRA(rank=16, alpha=16), "all-linear")
        play.teach(model, seed, RATE)
        return model

    def moved(seed: int) -> nn.Module:
        """The four-bit base with adapters that were trained on the full weights."""
        trained = {path: layer.delta for path, layer in adapt.adapted(on_full(seed)).items()}
        model = adapt.apply(copy.deepcopy(packed), adapt.LoRA(rank=16, alpha=16), "all-linear")
        for path, layer in adapt.adapted(model).items():
            layer.delta.load_state_dict(trained[path].state_dict())
        return model

    @cache
    def on_full(seed: int) -> nn.Module:
        return taught(play.model, seed)

    def arm(prepare: Callable[[int], nn.Module]) -> Callable[[int], dict[str, float]]:
        return lambda seed: {LOSS: play.loss(prepare(seed), seed)}

    ours, full, alone, put = "adapters on NF4", "adapters on the full weights", "NF4 alone", "adapters moved to NF4"
    verdict = lab.compare(
        arms={
            ours: arm(lambda seed: taught(packed, seed)),
            full: arm(on_full),
            alone: arm(lambda seed: packed),
            put: arm(moved),
        },
        main=Beats(ours, alone, on=LOSS, by=0.2, lower=True),
        # Half of what the rounding costs on this text would be some 0.1 nats.
        also=[Within(ours, full, on=LOSS, by=0.1, lower=True), Beats(ours, put, on=LOSS, lower=True)],
        seeds=2,
        measured={"bits a weight": compress.report(packed).bits_per_weight},
        note=f"{play.words}, at {RATE}. The full weights are float32 decoded from the public Q4_1 file: the base "
        "was rounded before.",
    )
    lab.points(LOSS, name="loss", title="Loss on an unseen part of the play, nats a token")
    return verdict


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive at once: every storage an operation makes, until it is freed."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        for tensor in held:
            self._watch(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step: the weights and gradients that stay, and the most that was alive at once."""

    kept: int
    peak: int


def _step_memory(model: nn.Module, batch: Tensor) -> Memory:
    live = _LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        value: Any = train.next_token_loss(model, batch)
        loss = value[0] if isinstance(value, tuple) else value
        loss.backward()
        del loss, value
    measured = Memory(live.now, live.peak)
    model.zero_grad()  # the next step is measured from the start
    return measured


@paper.claim(
    "Training SmolLM2 in four bits takes, at its peak, less than 45% of the weights and gradients of LoRA in 16 bits",
    paper="Abstract: from more than 780 GB to less than 48 GB for 65B parameters, against full fine-tuning in 16 bits",
    kind="exact",
    control="LoRA on the same model in bfloat16, with the same recomputation of activations",
)
def takes_less_memory(lab: Lab) -> Verdict:
    """Count the bytes of every tensor alive during one step of training, adapters on all linear layers."""
    found: dict[str, Memory] = {}
    model = smollm2(lab, smoke_depth=2).bfloat16()
    tokens = torch.randint(1000, (1, lab.pick(smoke=2, small=24)), device=lab.device)
    dense = _with_adapters_in_half(copy.deepcopy(model))
    packed = _with_adapters_in_half(compress.apply(model, FORMAT, "all-linear"))
    found["bfloat16, all activations kept"] = _step_memory(dense, tokens)
    found["NF4, all activations kept"] = _step_memory(packed, tokens)
    found["bfloat16"] = _step_memory(train.recompute(dense), tokens)
    found["NF4"] = _step_memory(train.recompute(packed), tokens)
    ours, theirs = found["NF4"], found["bfloat16"]
    lab.table(
        "One training step, millions of bytes",
        ["base", "weights and gradients", "most at once"],
        [[name, memory.kept / 1e6, memory.peak / 1e6] for name, memory in found.items()],
    )
    decoded = max(4 * layer.weights for layer in compress.report(packed).layers)
    return lab.judge(
        checks={
            "the peak is under 45% of the weights and gradients of bfloat16": ours.peak < 0.45 * theirs.kept,
            "so are the weights and gradients": ours.kept < 0.45 * theirs.kept,
            "no layer's weight stays decoded": ours.peak - ours.kept < theirs.peak - theirs.kept + 3 * decoded,
        },
        measured={
            "peak over the weights and gradients of bfloat16": ours.peak / theirs.kept,
            "peak over peak": ours.peak / theirs.peak,
            "weights and gradients over those of bfloat16": ours.kept / theirs.kept,
            "bytes at the peak": ours.peak,
        },
        control={"bytes kept, bfloat16": theirs.kept, "bytes at the peak": theirs.peak},
        note="Every tensor's storage is counted from the operation that made it until it is freed, through forward "
        f"and backward pass on one window of {tokens.numel()} tokens, adapters of rank 8 in bfloat16, the activations "
        "of each block computed again in the backward pass. The embedding stays in 16 bits and is a fifth of this "
        "small model; the optimizer's state lies on the host and is not counted for either.",
    )


def _with_adapters_in_half(model: nn.Module) -> nn.Module:
    return adapt.apply(model, adapt.LoRA(rank=8), "all-linear", dtype=torch.bfloat16)


@paper.claim(
    "Outputs and gradients are those of the decoded weight, which is kept nowhere; paged AdamW is AdamW",
    paper="Equations 5 and 6: Y = X doubleDequant(c1, c2, W) + X L1 L2, gradients to the adapters only; Section 3, "
    "Paged Optimizers",
    kind="exact",
)
def same_numbers(lab: Lab) -> Verdict:
    """Compare with a plain layer that holds the decoded weights, look at what is kept, and train in pages."""
    spec = replace(api.preset("smollm2-135m"), vocab_size=256, depth=lab.pick(smoke=1, small=2))
    torch.manual_seed(lab.seed)
    packed = compress.apply(api.build(spec), FORMAT, "all-linear")
    bits = compress.report(packed).bits_per_weight
    plain = compress.decompress(copy.deepcopy(packed))
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        bare = plain(tokens)
    for each in (packed, plain):
        _with_adapters(lab, each, rank=4)
    with torch.no_grad():
        fresh = (packed(tokens) - bare).abs().max().item()
    for each in (packed, plain):
        torch.manual_seed(lab.seed)
        for layer in adapt.adapted(each).values():
            nn.init.normal_(layer.delta.up, std=0.02)  # type: ignore[arg-type]
    shapes: list[tuple[int, ...]] = []
    weights = {tuple(weight_of(layer.base).shape) for layer in adapt.adapted(packed).values()}

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(tokens).square().mean().backward()
    plain(tokens).square().mean().backward()
    ours, theirs = ([p for p in each.parameters() if p.requires_grad] for each in (packed, plain))
    apart = max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in zip(ours, theirs, strict=True))  # type: ignore[union-attr, operator]
    frozen = all(p.grad is None for p in packed.parameters() if not p.requires_grad)
    kept = [shape for shape in shapes if shape in weights or shape[::-1] in weights]
    equal = _paged_equals_plain(lab, packed)
    return lab.judge(
        checks={
            "gradients equal those through the decoded weight, to 1e-5": apart < 1e-5,
            "at first the outputs are those of the decoded weight": fresh < 1e-5,
            "the base gets no gradient": frozen,
            "no decoded weight is kept for the backward pass": not kept,
            "paged AdamW gives the bits of AdamW": equal,
            "4.127 bits a weight, and one number a matrix": abs(bits - (4 + 8 / 64 + 32 / (64 * 256))) < 2e-3,
        },
        measured={"largest relative difference of gradients": apart, "of outputs": fresh, "bits a weight": bits},
    )


def _paged_equals_plain(lab: Lab, model: DecoderModel | nn.Module) -> bool:
    """Train two copies for three steps, with a budget of two pages and with the ordinary optimizer."""
    batches = [torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    optimizers = (train.AdamW(), train.PagedAdamW(budget=2 * 8 * 4096, page=4096))
    models = [copy.deepcopy(model) for _ in range(2)]
    for each, optimizer in zip(models, optimizers, strict=True):
        settings = train.Settings(steps=3, lr=1e-2, optimizer=optimizer, seed=lab.seed, save_every=None, progress=False)
        train.fit(each, train.next_token_loss, batches, settings)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
