"""Mixtral's layer and the knobs of mixtures: dropless routing, upcycling a dense model, the router's z-loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks import train
from paperworks.data.text.texts import load_text
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models import Decoder, DecoderModel, count_parameters
from paperworks.models.presets.families import llama
from paperworks.models.surgery.upcycling import upcycle
from paperworks.nn import Experts, GatedMLP, RoPE, TopKRouter
from paperworks.nn.feedforward.experts.routers import TopKRouterModule, z_loss
from paperworks.testbeds.characters import BATCH, LENGTH, character_llama, further_trained, held_out_loss, play, trained
from paperworks.testbeds.smollm2 import PROVENANCE, smollm2
from paperworks.testbeds.training import fit

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
    equation=(
        r"y = \sum_{i \in \operatorname{top}_2} "
        r"\operatorname{softmax}(\operatorname{top}_2(W_g x))_i \operatorname{SwiGLU}_i(x)"
    ),
    budget_exception="Three seeds take three and a half minutes on a machine that other runs share.",
    usage="""
import torch
import paperworks as pw
from paperworks.models import count_parameters
from paperworks.models.surgery.upcycling import upcycle

model = pw.load("smollm2")
mixture = upcycle(model, 4, 2)  # every feed-forward layer copied into four experts, two for each token
tokens = torch.tensor([model.tokenizer.encode("The capital of France is")])
print("largest difference of the logits:", float((mixture(tokens) - model(tokens)).detach().abs().max()))
print(count_parameters(model), "->", count_parameters(mixture), "parameters")
""",
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
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)  # outputs near 1, on which a tolerance says something
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
    control="the dense model trained on for the same steps; experts that are drawn at random instead of copied",
    reach="real",
)
def upcycled_learns(lab: Lab) -> Verdict:
    """Train a dense character model, copy it into eight experts, and train both on alike."""
    play()
    steps, extra = lab.pick(smoke=3, small=300), lab.pick(smoke=3, small=250)
    spec = character_llama(depth=lab.pick(smoke=1, small=2))
    dense = cache(lambda seed: trained(lab, spec, steps, seed, "dense"))

    def trained_on(make: Callable[[DecoderModel], DecoderModel]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = make(copy.deepcopy(dense(seed)))
            before = held_out_loss(lab, model)
            further_trained(lab, model, extra, seed + 1000, "trained on")
            return {
                "held-out loss": held_out_loss(lab, model),
                "held-out loss before": before,
                "cosine of two experts": _likeness(model),
            }

        return measures

    def copied(model: DecoderModel) -> DecoderModel:
        return upcycle(model, COUNT, TOP, router=TopKRouter(balance=0.01, z=Z))

    def random(model: DecoderModel) -> DecoderModel:
        mixture = copied(model)
        for name, weight in mixture.named_parameters():
            if ".experts." in name:
                nn.init.normal_(weight, std=float(weight.detach().std()))
        return mixture

    verdict = lab.compare(
        arms={
            "copied experts": trained_on(copied),
            "dense": trained_on(lambda model: model),
            "random experts": trained_on(random),
        },
        main=Beats("copied experts", "dense", on="held-out loss", by=0.01, lower=True),
        also=[
            Beats("copied experts", "random experts", on="held-out loss", lower=True),
            Within("copied experts", "dense", on="held-out loss before", by=1e-4),
            AtMost("copied experts", 0.99, on="cosine of two experts"),
        ],
        seeds=3,
        note=f"Nats a character of tinyshakespeare; {steps} steps dense, {extra} more for each arm, windows of {BATCH} "
        f"x {LENGTH}. A token of a mixture costs two feed-forward layers, the dense model's one.",
    )
    lab.points("held-out loss", title="Loss after the same further steps")
    return verdict


@torch.no_grad()
def _likeness(model: DecoderModel) -> float:
    """Mean cosine between the up projections of different experts of a layer; 1 where there is one."""
    found = []
    for block in model.blocks:
        layer: Any = block.feedforward
        if not hasattr(layer, "experts"):
            return 1.0
        rows = F.normalize(torch.stack([expert.up.weight.flatten() for expert in layer.experts]), dim=-1)
        cosines = rows @ rows.t()
        found.append((cosines.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
    return float(torch.stack(found).mean())


@paper.claim(
    "The z-loss keeps router logits small where they would run away",
    paper="ST-MoE, Section 3: the router z-loss stabilizes training without loss of quality",
    control="the same model and steps without it",
    reach="real",
)
def z_loss_holds_logits(lab: Lab) -> Verdict:
    """Train a two-layer mixture at a hot learning rate, with and without, and read the largest logit on the way."""
    play()
    steps = lab.pick(smoke=4, small=120)
    base = character_llama(dim=64, depth=2)

    def arm(weight: float) -> Callable[[int], dict[str, float | list[float]]]:
        def measures(seed: int) -> dict[str, float | list[float]]:
            router = TopKRouter(balance=0.01, z=weight)
            experts = Experts(expert=GatedMLP(hidden=64), count=COUNT, top=TOP, router=router)
            model = replace(base, block=replace(base.blocks[0], feedforward=experts)).build()
            trace = _largest_logits(lab, model, steps, seed)
            return {
                "largest logit at the end": trace[-1],
                "held-out loss": held_out_loss(lab, model.eval()),
                "largest router logit": trace,
            }

        return measures

    verdict = lab.compare(
        arms={"z-loss": arm(Z), "no z-loss": arm(0.0)},
        main=Beats("z-loss", "no z-loss", on="largest logit at the end", by=20, lower=True),
        also=[
            AtMost("z-loss", 10, on="largest logit at the end"),
            Within("z-loss", "no z-loss", on="held-out loss", by=0.05, lower=True),
        ],
        seeds=3,
        note=f"Two layers of width 64, 8 experts, {steps} steps at a peak rate of {HOT}, thirty times what such "
        "models are trained with elsewhere; logits of the training batches.",
    )
    lab.curves("largest router logit", name="logits", title="Largest router logit of each step", log="y")
    return verdict


def _largest_logits(lab: Lab, model: DecoderModel, steps: int, seed: int) -> list[float]:
    """Train, and give the largest router logit of each step."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouterModule)]
    seen: list[Tensor] = []

    def read(module: Any, inputs: tuple[Any, ...]) -> None:
        seen.append((inputs[0].detach() @ module.logits.weight.detach().t()).abs().max())

    hooks = [router.register_forward_pre_hook(read) for router in routers]
    batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=seed)
    with lab.threads(1):
        fit(model, train.next_token_loss, batches, steps=steps, lr=HOT, seed=seed, warmup=0.1)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).view(steps, len(routers)).amax(1).tolist()
