"""Mixtral's layer and the knobs of mixtures: dropless routing, upcycling a dense model, the router's z-loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks import train
from paperworks.data.text.texts import load_text
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Decoder, DecoderModel, count_parameters
from paperworks.models.presets.families import llama
from paperworks.models.surgery.upcycling import upcycle
from paperworks.nn import Experts, GatedMLP, RoPE, TopKRouter
from paperworks.nn.feedforward.experts.routers import TopKRouterModule, z_loss
from paperworks.testbeds.characters import BATCH, LENGTH, character_llama, further_trained, held_out_loss, play, trained
from paperworks.testbeds.smollm2 import PROVENANCE, smollm2

paper = Paper(
    key="mixtral-moe",
    title="Mixture of Experts Explained",
    authors="Sanseviero, Tunstall, Schmid, Mangrulkar, Belkada, Cuenca",
    year=2023,
    ref="huggingface.co/blog/moe; arXiv:2401.04088 (Mixtral); arXiv:2202.08906 (z-loss)",
    family="experts",
    summary=(
        "Mixtral replaces each feed-forward layer by eight, of which a token uses the best two: 47 billion parameters "
        "that cost as much as 13. Dense models can be copied into mixtures, and a small loss keeps router logits small."
    ),
    implements=(
        "paperworks.nn.feedforward.experts.mixture.Experts",
        "paperworks.nn.feedforward.experts.routers.TopKRouter",
        "paperworks.nn.feedforward.experts.routers.z_loss",
        "paperworks.models.surgery.upcycling.upcycle",
    ),
)

COUNT, TOP = 8, 2
TOTAL = 46_702_792_704  # parameters of the published weights
HOT = 0.1  # a learning rate at which router logits run away
Z = 1e-3  # weight of the z-loss (ST-MoE, Section 3)


def _mixtral() -> Decoder:
    """Mixtral 8x7B (Table 1 of its paper; no sliding window)."""
    base = llama(4096, 32, 32, 14_336, kv_heads=8, context=32_768, rope=RoPE(base=1e6), eps=1e-5)
    experts = Experts(expert=GatedMLP(hidden=14_336), count=COUNT, top=TOP)
    return replace(base, block=replace(base.blocks[0], feedforward=experts))


@paper.claim(
    "Mixtral has 46.7 billion parameters and uses 12.9 for a token; two ways to weigh the chosen two are one",
    paper="Mixtral, Sections 2.1 and 3: 47B parameters, 13B active; ST-MoE, Equation 5 (z-loss)",
    kind="exact",
    control="the softmax over all experts, not renormalized",
)
def layer_is_mixtrals(lab: Lab) -> Verdict:
    """Count on the meta device; compare weights, the dispatch and the gradient of the z-loss in float64."""
    spec = _mixtral()
    total = count_parameters(spec)
    unused = spec.depth * (COUNT - TOP) * 3 * 4096 * 14_336
    torch.manual_seed(lab.seed)
    router = TopKRouter()
    layer: Any = Experts(expert=GatedMLP(hidden=24), count=COUNT, top=TOP, router=router).build(16).double()
    renormalized, plain = (
        _with_router(layer, TopKRouter(softmax="before", renormalize=renormalize)) for renormalize in (True, False)
    )
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    logits = torch.randn(64, COUNT, dtype=torch.float64, requires_grad=True)
    z_loss(logits).backward()
    lse = logits.detach().logsumexp(-1, keepdim=True)
    assert logits.grad is not None
    with torch.no_grad():
        out = layer(x)
        apart = float((renormalized(x) - out).abs().max())
        unlike = float((plain(x) - out).abs().max())
        from_loop = float((_by_loop(layer, x[0]) - out[0]).abs().max())
        from_formula = float((logits.grad - 2 * lse * logits.softmax(-1) / 64).abs().max())
    return lab.judge(
        checks={
            "46,702,792,704 parameters": total == TOTAL,
            "12.88 billion active": abs((total - unused) / 1e9 - 12.88) < 0.005,
            "softmax over the two is the renormalized softmax over all": apart < 1e-14,
            "grouped dispatch is the loop over tokens": from_loop < 1e-14,
            "gradient of the z-loss is 2 lse softmax / tokens": from_formula < 1e-14,
            "not renormalized, outputs are others": unlike > 1e-3,
        },
        measured={
            "parameters": total,
            "active": total - unused,
            "renormalized against after, largest difference": apart,
            "dispatch against the loop": from_loop,
            "gradient of the z-loss against its formula": from_formula,
        },
        control={"not renormalized against after, largest difference": unlike},
    )


def _with_router(layer: Any, router: TopKRouter) -> Any:
    other = copy.deepcopy(layer)
    other.router.spec = router
    return other


def _by_loop(layer: Any, x: Tensor) -> Tensor:
    """y = softmax(the two largest of W x) . (down(silu(gate x) * up x)), a token and an expert at a time."""
    rows = []
    for token in x:
        best, chosen = (layer.router.logits.weight @ token).topk(TOP)
        row = torch.zeros_like(token)
        for weight, index in zip(best.softmax(-1), chosen.tolist(), strict=True):
            expert = layer.experts[index]
            row = row + weight * (
                expert.down.weight @ (F.silu(expert.gate.weight @ token) * (expert.up.weight @ token))
            )
        rows.append(row)
    return torch.stack(rows)


@paper.claim(
    "Copied into eight experts, a trained model says exactly what it said",
    paper="Sparse upcycling (Komatsuzaki et al. 2022): from copies, weights that sum to 1 keep the function",
    kind="exact",
    control="the same copies weighted by the softmax over all eight, as Switch weighs its one",
)
@torch.no_grad()
def upcycling_is_exact(lab: Lab) -> Verdict:
    """Copy every feed-forward layer of SmolLM2-135M eight times and compare logits on a text."""
    model = smollm2(lab)
    text = load_text("tinyshakespeare", download=True).text
    length = lab.pick(smoke=16, small=256)
    tokens = torch.tensor(model.tokenizer.encode(text[: 8 * length], bos=False)[:length], device=lab.device)[None]
    before = model(tokens)
    torch.manual_seed(lab.seed)
    mixture = upcycle(model, COUNT, TOP)
    after = mixture(tokens)
    used = _experts_used(mixture, tokens)
    largest, apart = float(before.abs().max()), float((after - before).abs().max())
    for module in mixture.modules():
        if isinstance(module, TopKRouterModule):
            module.spec = TopKRouter(softmax="before")
    scaled = float((mixture(tokens) - before).abs().max())
    return lab.judge(
        checks={
            "logits agree to float32 rounding": apart < 1e-5 * largest,
            "tokens were spread over all experts": used == COUNT,
            "weights that sum to less than 1 change them": scaled > 0.1 * largest,
        },
        measured={
            "largest difference of logits": apart,
            "largest logit": largest,
            "parameters before": count_parameters(model),
            "parameters after": count_parameters(mixture),
        },
        control={"largest difference of logits, softmax over all": scaled},
        note=PROVENANCE if lab.scale != "smoke" else "",
    )


def _experts_used(model: DecoderModel, tokens: Tensor) -> int:
    """Return how many experts of the first layer any token goes to."""
    first: Any = model.blocks[0].feedforward
    seen: list[Tensor] = []
    hook = first.choice.register_forward_hook(lambda _module, _inputs, chosen: seen.append(chosen))
    model(tokens)
    hook.remove()
    return len(seen[0].unique())


@paper.claim(
    "Trained on, the copies come apart and the loss falls below the dense model's",
    paper="Sparse upcycling, abstract: better than dense counterparts for some 50% of their first training cost",
    control="the dense model trained on for the same steps",
)
def upcycled_learns(lab: Lab) -> Verdict:
    """Train a dense character model, copy it into eight experts, and train both on alike."""
    play()
    steps, extra = lab.pick(smoke=3, small=400), lab.pick(smoke=3, small=300)
    dense = trained(lab, character_llama(depth=lab.pick(smoke=1, small=3)), steps, lab.seed, "dense")
    start = held_out_loss(lab, dense)
    torch.manual_seed(lab.seed)
    mixture = upcycle(dense, COUNT, TOP, router=TopKRouter(balance=0.01, z=Z))
    upcycled = held_out_loss(lab, mixture)
    mixture = further_trained(lab, mixture, extra, lab.seed + 1000, "upcycled")
    dense = further_trained(lab, dense, extra, lab.seed + 1000, "dense, trained on")
    losses = {"mixture": held_out_loss(lab, mixture), "dense": held_out_loss(lab, dense)}
    likeness = _likeness(mixture)
    return lab.judge(
        checks={
            "below the dense model trained on": losses["mixture"] < losses["dense"],
            "lower than at the start": losses["mixture"] < start,
            "experts differ": likeness < 0.99,
            "nothing was lost by copying": abs(upcycled - start) < 1e-4,
        },
        measured={
            "held-out loss": losses["mixture"],
            "held-out loss at the start": start,
            "mean cosine of two experts' weights": likeness,
            "steps before and after": [steps, extra],
        },
        control={"held-out loss, dense trained on": losses["dense"]},
        note=f"Nats a character of tinyshakespeare; both have the same recipe and windows of {BATCH} x {LENGTH}. "
        "A token of the mixture costs two feed-forward layers, the dense model's one.",
    )


@torch.no_grad()
def _likeness(model: DecoderModel) -> float:
    """Return the mean cosine between the up projections of different experts of a layer."""
    found = []
    for block in model.blocks:
        layer: Any = block.feedforward
        rows = F.normalize(torch.stack([expert.up.weight.flatten() for expert in layer.experts]), dim=-1)
        cosines = rows @ rows.t()
        found.append((cosines.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
    return float(torch.stack(found).mean())


@paper.claim(
    "The z-loss keeps router logits small where they would run away",
    paper="ST-MoE, Section 3: the router z-loss stabilizes training without loss of quality",
    control="the same model and steps without it",
)
def z_loss_holds_logits(lab: Lab) -> Verdict:
    """Train a two-layer mixture at a hot learning rate, with and without, and read the largest logit on the way."""
    steps = lab.pick(smoke=4, small=120)
    every = max(1, steps // 24)
    traces: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for name, weight in (("z-loss", Z), ("none", 0.0)):
        base = character_llama(dim=64, depth=2)
        router = TopKRouter(balance=0.01, z=weight)
        experts = Experts(expert=GatedMLP(hidden=64), count=COUNT, top=TOP, router=router)
        torch.manual_seed(lab.seed)
        model = replace(base, block=replace(base.blocks[0], feedforward=experts)).build()
        traces[name] = _largest_logits(lab, model, steps, every, name)
        losses[name] = held_out_loss(lab, model.eval())
    with lab.figure("logits", figsize=(6.6, 2.8)) as figure:
        axes = figure.subplots()
        for (name, trace), color in zip(traces.items(), (COLORS[0], CONTROL), strict=True):
            label = "with the z-loss" if name == "z-loss" else "without"
            axes.plot([every * (index + 1) for index in range(len(trace))], trace, color=color, label=label)
        axes.set(title="Largest router logit", xlabel=f"step, learning rate {HOT}", ylabel="|logit|", yscale="log")
        axes.set_yticks([3, 10, 30, 60], ["3", "10", "30", "60"])
        axes.minorticks_off()
        axes.legend(loc="center right")
    return lab.judge(
        checks={
            "under 10 at the end": traces["z-loss"][-1] < 10,
            "without it above 30": traces["none"][-1] > 30,
            "the loss is no higher for it, to 0.05 nats": losses["z-loss"] < losses["none"] + 0.05,
        },
        measured={
            "largest logit at the end": traces["z-loss"][-1],
            "largest on the way": max(traces["z-loss"]),
            "held-out loss": losses["z-loss"],
        },
        control={
            "largest logit at the end, none": traces["none"][-1],
            "largest on the way, none": max(traces["none"]),
            "held-out loss, none": losses["none"],
        },
        note=f"Two layers of width 64, 8 experts, {steps} steps at a peak rate of {HOT}, thirty times what such "
        "models are trained with elsewhere; logits of 2,048 held-out characters.",
    )


def _largest_logits(lab: Lab, model: DecoderModel, steps: int, every: int, description: str) -> list[float]:
    held_out = play().held_out_windows(length=LENGTH, count=32)[0]["tokens"]
    routers = [module for module in model.modules() if isinstance(module, TopKRouterModule)]
    trace: list[float] = []
    seen: list[float] = []

    def read(module: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(float((inputs[0] @ module.logits.weight.t()).abs().max()))

    def look(step: int) -> None:
        advance(1)
        if step % every:
            return
        seen.clear()
        hooks = [router.register_forward_pre_hook(read) for router in routers]
        with torch.no_grad():
            model(held_out)
        for hook in hooks:
            hook.remove()
        trace.append(max(seen))

    settings = train.Settings(
        steps=steps, lr=HOT, warmup=0.1, seed=lab.seed, save_every=None, log_every=steps, progress=False
    )
    batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=lab.seed)
    with lab.threads(1), lab.progress(description, steps) as advance:
        train.fit(model, train.next_token_loss, batches, settings, on_step=look)
    return trace
