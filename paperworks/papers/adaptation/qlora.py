"""QLoRA: fine-tune adapters through a base of four bits a weight, and lose nothing by it."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paperworks import adapt, api, compress, train
from paperworks.core.errors import AssetUnavailable
from paperworks.core.linear import weight_of
from paperworks.data.text.texts import PYTHON_DOCS, load_records, load_text
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
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
)

FORMAT = compress.NF4(block=64, double_quantization=True)
RECORDS = "self-instruct"


def _instructions(lab: Lab, tokenizer: Any, rows: int, length: int) -> tuple[Tensor, str]:
    """Return windows of instructions and answers, each of `length` tokens, and what they are in words."""
    try:
        texts = [f"{r['instruction']}\n{r['instances'][0]['output']}" for r in load_records(RECORDS).rows]
        words = "hand-written instructions with their answers (the seeds of Self-Instruct)"
    except AssetUnavailable:
        texts, words = (
            [load_text(PYTHON_DOCS).text],
            "Python's documentation (the instructions are not on this machine)",
        )
    tokens = tokenizer.encode("\n\n".join(texts)[: 8 * rows * length], bos=False)
    return torch.tensor(tokens[: rows * length], device=lab.device).view(-1, length), words


def _with_adapters(lab: Lab, model: nn.Module, rank: int = 16) -> nn.Module:
    torch.manual_seed(lab.seed)
    return adapt.apply(model, adapt.LoRA(rank=rank, alpha=16), "all-linear")


def _fit(lab: Lab, model: nn.Module, windows: Tensor, steps: int, description: str) -> list[float]:
    """Train the adapters with state in pages, four windows a step, and return the loss of every step.

    The rate falls to zero: at a constant one the loss of a step says more about the step than about the base.
    """
    losses: list[float] = []
    draws = torch.Generator().manual_seed(lab.seed)
    batches = [windows[torch.randint(len(windows), (4,), generator=draws)] for _ in range(steps)]
    settings = train.Settings(
        steps=steps,
        lr=1e-3,
        optimizer=train.PagedAdamW(budget=2**22, page=2**16, weight_decay=0.0),
        warmup=0.05,
        schedule="linear",
        min_lr=0.0,
        clip=0.3,  # Appendix B.2
        seed=lab.seed,
        save_every=None,
        log_every=1,
        progress=False,
    )
    with lab.progress(description, steps) as advance:
        train.fit(
            model,
            train.next_token_loss,
            batches,
            settings,
            on_step=lambda step: advance(1),
            callbacks=[lambda record: losses.append(record["loss"]) if "loss" in record else None],
        )
    return losses


def _loss(model: nn.Module, windows: Tensor) -> float:
    return train.evaluate(model, train.next_token_loss, list(windows.split(4)))["loss"]


@paper.claim(
    "Adapters on SmolLM2 in four bits end within 5% of the loss of adapters on the full weights",
    paper="Table 4: MMLU of LLaMA with adapters on NF4 + DQ 53.1, on BFloat16 53.0, on FP4 52.2 (means over models)",
    control="the base in four bits as it is, without adapters: what the rounding costs on the same text",
)
def matches_full_precision(lab: Lab) -> Verdict:
    """Train rank-16 adapters on every linear layer of SmolLM2, as loaded and in four bits, on the same batches."""
    model = smollm2(lab, smoke_depth=2)
    steps, rows, length = lab.pick(smoke=(1, 4, 8), small=(60, 32, 40), large=(500, 128, 128))
    windows, words = _instructions(lab, model.tokenizer, rows, length)
    model.tokenizer = None
    packed = compress.apply(copy.deepcopy(model), FORMAT, "all-linear")
    report = compress.report(packed)
    dense_bytes = sum(2 * layer.weights for layer in report.layers)
    before = {"as loaded": _loss(model, windows), "NF4": _loss(packed, windows)}
    frozen = {name: value.clone() for name, value in packed.state_dict().items()}
    curves = {
        name: _fit(lab, _with_adapters(lab, each), windows, steps, f"adapters, {name}")
        for name, each in (("as loaded", model), ("NF4", packed))
    }
    after = {"as loaded": _loss(model, windows), "NF4": _loss(packed, windows)}
    now = {name.replace(".base.", "."): value for name, value in packed.state_dict().items()}
    untouched = all(torch.equal(now[name], value) for name, value in frozen.items())
    gap, left = before["NF4"] - before["as loaded"], after["NF4"] - after["as loaded"]
    _draw(lab, curves)
    lab.table(
        "Loss on the training text, in nats a token",
        ["base", "before", "after"],
        [[name, before[name], after[name]] for name in before],
    )
    return lab.judge(
        checks={
            "the final loss is within 5% of that on the full weights": abs(after["NF4"] / after["as loaded"] - 1)
            < 0.05,
            "at least half of what the rounding cost is won back": gap > 0 and left <= 0.5 * gap,
            "and training did something": after["NF4"] < 0.9 * before["NF4"],
            "the layers take at most 0.30 of 16 bits": sum(x.bytes for x in report.layers) <= 0.30 * dense_bytes,
            "no bit of the base was changed": untouched,
        },
        measured={
            "loss, adapters on NF4": after["NF4"],
            "loss, adapters on the full weights": after["as loaded"],
            "distance left between them": left,
            "bits a weight": report.bits_per_weight,
            "steps": steps,
        },
        control={"loss, NF4 without adapters": before["NF4"], "loss as loaded": before["as loaded"], "distance": gap},
        note=f"{rows} windows of {length} tokens of {words}; four windows a step, {steps} steps from 1e-3 down to 0, "
        "gradient norm at most 0.3. The full weights are float32 decoded from the public Q4_1 file, so the base was "
        "rounded before.",
    )


def _draw(lab: Lab, curves: dict[str, list[float]]) -> None:
    with lab.figure("loss", figsize=(7.6, 3.2)) as figure:
        axes = figure.subplots()
        colors = {"as loaded": CONTROL, "NF4": COLORS[0]}
        for name, curve in curves.items():
            label = "base in NF4, 4.127 bits a weight" if name == "NF4" else "base in 32 bits"
            axes.plot(range(1, len(curve) + 1), curve, color=colors[name], label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimization steps")
        axes.set_title("Loss of each batch while the adapters are trained, nats a token")
        axes.legend()


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
