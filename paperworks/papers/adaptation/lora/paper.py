"""LoRA: what fine-tuning changes in a weight has low rank, so train two thin matrices and freeze the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from paperworks import adapt, api
from paperworks.adapt.lora import LowRankDelta
from paperworks.core.linear import weight_of
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models import DecoderModel
from paperworks.papers.adaptation._play import lesson
from paperworks.papers.adaptation.lora.subspaces import subspace_similarity
from paperworks.testbeds.pictures import Classes, Images, fit, network

paper = Paper(
    key="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors="Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
    year=2021,
    ref="arXiv:2106.09685",
    family="adaptation",
    summary=(
        "A frozen weight W0 plus a trained product B A of rank r, B zero at first: a fraction of a percent of the "
        "parameters adapts a language model, and the product can be merged into the weight when it is done."
    ),
    implements=(
        "paperworks.adapt.lora.LoRA",
        "paperworks.adapt.lora.LowRankDelta",
        "paperworks.adapt.delta.AdaptedLinear",
        "paperworks.adapt.merging.merge",
        "paperworks.papers.adaptation.lora.subspaces.subspace_similarity",
    ),
    equation=r"h = W_0 x + \tfrac{\alpha}{r} B A x, \quad B \in \mathbb{R}^{d \times r}, A \in \mathbb{R}^{r \times k}",
    usage="""
import torch
from paperworks import adapt

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
x = torch.randn(4, 64)
before = model(x)
adapt.apply(model, adapt.LoRA(rank=4, alpha=8), "all-linear")
print("trained:", adapt.trainable_parameters(model), "unchanged at first:", torch.equal(model(x), before))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model(x).square().mean().backward()
optimizer.step()
adapted = model(x)
print("merging changes at most", (adapt.merge(model)(x) - adapted).abs().max().item())
""",
    notes="The catalogue of tasks (GLUE, WikiSQL, MNLI on RoBERTa and GPT-3) is replaced by a play that SmolLM2 is "
    "taught for a dozen steps.",
)

QUERY_VALUE = "blocks.*.mixer.{query,value}"
LOSS = "held-out loss"
# Best on seed 100 of three rates and more, in six steps.
LORA_RATE, FULL_RATE, NORM_RATE = 3e-3, 3e-4, 3e-3


def _low_rank(model: DecoderModel) -> DecoderModel:
    """Copy of a model with adapters of rank 8 on query and value, of scale 2."""
    adapted = copy.deepcopy(model)
    adapt.apply(adapted, adapt.LoRA(rank=8, alpha=16), QUERY_VALUE)
    return adapted


def _directions_of(model: nn.Module) -> list[Tensor]:
    """A copy of A of each adapted layer."""
    return [layer.delta.state_dict()["down"].clone() for layer in adapt.adapted(model).values()]


def _norms_alone(model: DecoderModel) -> DecoderModel:
    tuned = copy.deepcopy(model)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("norm" in name)
    return tuned


@paper.claim(
    "Training 0.34% of the parameters teaches SmolLM2 a play, and leaves the rest bit for bit",
    paper="Abstract: GPT-3 175B adapted with 10,000 times fewer trained parameters; Section 4.1: W0 is frozen",
    control="the same adapters with B never updated",
    reach="real",
    tour=3,
)
def learns_with_few_parameters(lab: Lab) -> Verdict:
    """Train rank-8 adapters on query and value on a play, and score the model on a part that it has not seen."""
    play = lesson(lab, steps=4, scored=4)
    total = sum(parameter.numel() for parameter in play.model.parameters())

    def arm(trains_b: bool) -> Callable[[int], dict[str, float]]:
        def taught(seed: int) -> dict[str, float]:
            model = _low_rank(play.model)
            start, trained = _directions_of(model), adapt.trainable_parameters(model)
            for layer in adapt.adapted(model).values():
                assert isinstance(layer.delta, LowRankDelta)
                layer.delta.up.requires_grad_(trains_b)
            # While B is zero, A has no gradient: one step shows that nothing moves, and more would cost time only.
            (play if trains_b else replace(play, steps=1)).teach(model, seed, LORA_RATE)
            moved = (after - before for after, before in zip(_directions_of(model), start, strict=True))
            return {
                LOSS: play.loss(model, seed),
                "trained, percent": 100 * trained / total,
                "largest change of A": max(float(change.abs().max()) for change in moved),
                "weights of the base changed": _changed(play.model, model),
            }

        return taught

    ours, control = "LoRA", "B never updated"
    verdict = lab.compare(
        arms={ours: arm(True), control: arm(False)},
        main=Beats(ours, control, on=LOSS, by=0.1, lower=True),
        also=[
            AtMost(ours, 1.0, on="trained, percent"),
            AtMost(control, 0, on="largest change of A"),
            AtMost(ours, 0, on="weights of the base changed"),
        ],
        seeds=3,
        note=f"Rank 8 on query and value of all 30 layers; {play.words}. While B is zero the model is the one loaded.",
    )
    lab.points(LOSS, name="loss", title="Loss on an unseen part of the play, nats a token")
    return verdict


def _changed(model: DecoderModel, adapted: DecoderModel) -> int:
    """Number of weights of a model that are not the same, bit for bit, in an adapted copy."""
    theirs = dict(adapted.named_parameters())
    changed = 0
    for name, value in model.named_parameters():
        kept = theirs[name] if name in theirs else theirs[name.replace(".weight", ".base.weight")]
        changed += int((value != kept).sum())
    return changed


@paper.claim(
    "Adapters do about as well as training all weights, and better than training little else",
    paper="Table 4: WikiSQL on GPT-3 175B 73.4 (4.7M parameters) and 74.0 (37.7M), all weights 73.8; training biases "
    "alone is the paper's other baseline",
    control="training the scales of the norms alone: SmolLM2 has no biases",
    reach="real",
)
def as_good_as_all_weights(lab: Lab) -> Verdict:
    """Teach SmolLM2 a play by adapters, by all of its weights and by its norms, and score it on an unseen part."""
    play = lesson(lab, steps=8)

    def arm(prepare: Callable[[DecoderModel], DecoderModel], rate: float) -> Callable[[int], dict[str, float]]:
        def taught(seed: int) -> dict[str, float]:
            model = prepare(play.model)
            play.teach(model, seed, rate)
            return {LOSS: play.loss(model, seed)}

        return taught

    ours, full, norms = "LoRA", "all weights", "norms alone"
    verdict = lab.compare(
        arms={
            ours: arm(_low_rank, LORA_RATE),
            full: arm(copy.deepcopy, FULL_RATE),
            norms: arm(_norms_alone, NORM_RATE),
        },
        main=Beats(ours, norms, on=LOSS, by=0.05, lower=True),
        also=[Within(ours, full, on=LOSS, by=0.1, lower=True)],
        seeds=2,
        measured={"held-out loss as loaded, seed 0": play.loss(play.model, lab.seed)},
        note=f"Rank 8 on query and value of all 30 layers; {play.words}. Each method has its best rate.",
    )
    lab.points(LOSS, name="methods", title="Loss on an unseen part of the play, nats a token")
    return verdict


@paper.claim(
    "Adapters of rank 4 and 16, trained apart, find the same directions",
    paper="Section 7.2, Figures 3 and 4: the top singular directions of A at r = 8 and at r = 64 overlap by more than "
    "0.5, as do those of two seeds; those of two random matrices do not",
    control="the same adapters before they are trained",
)
def ranks_share_directions(lab: Lab) -> Verdict:
    """Adapt a network to turned images from several starts, and compare the four top directions of each A."""
    steps = lab.pick(smoke=5, small=300)

    def arm(trained: bool) -> Callable[[int], dict[str, float]]:
        def overlaps(seed: int) -> dict[str, float]:
            upright, turned = (Classes.smooth(6, 0.5, degrees=degrees) for degrees in (0, 90))
            base = network(seed)
            if trained:
                fit(base, upright.draw(4000, 10 * seed + 1, classes=5), steps=steps, rate=3e-3, seed=seed, batch=64)
            data = turned.draw(1200, 10 * seed + 2)
            small, large, other = (
                _directions(base, data, rank, 10 * seed + number, steps if trained else 0)
                for number, rank in enumerate((4, 16, 16))
            )
            return {"overlap, ranks 4 and 16": _overlap(small, large), "overlap, two seeds": _overlap(large, other)}

        return overlaps

    ranks, seeds = "overlap, ranks 4 and 16", "overlap, two seeds"
    with lab.threads(1):
        verdict = lab.compare(
            arms={"trained": arm(True), "before training": arm(False)},
            main=Beats("trained", "before training", on=ranks, by_ratio=2.0),
            also=[Beats("trained", "before training", on=seeds, by_ratio=2.0)],
            seeds=3,
            note="Overlap phi(4, 4) of the four top directions of A, the lower of two layers: 1 is the same subspace, "
            "chance gives 0.06. A network of 64-64-64-10 learns five classes of generated images, then ten classes "
            "turned by a quarter. Three times the overlap before training is our bar.",
        )
    lab.points(ranks, name="directions", title="Overlap of the directions that adapters of rank 4 and 16 find")
    return verdict


def _directions(base: nn.Module, data: Images, rank: int, seed: int, steps: int) -> list[Tensor]:
    """A of each adapted layer, from a start of its own, after so many steps."""
    torch.manual_seed(seed)
    model = adapt.apply(copy.deepcopy(base), adapt.LoRA(rank=rank), ["0", "2"])
    if steps:
        fit(model, data, steps=steps, rate=1e-2, seed=seed, batch=64)
    return _directions_of(model)


def _overlap(some: list[Tensor], others: list[Tensor]) -> float:
    return min(float(subspace_similarity(mine, its)[3, 3]) for mine, its in zip(some, others, strict=True))


@paper.claim(
    "Adapters train r (d + k) parameters a matrix: 18.9 million of GPT-3's 175 billion at rank 4",
    paper="Section 7.1, Table 5: 18M for r = 4 on W_q, W_v of GPT-3; 4.7M for r = 1 (Table 4); 0.3M for RoBERTa-base "
    "at r = 8 (Table 2)",
    kind="exact",
)
def parameter_counts(lab: Lab) -> Verdict:
    """Put adapters on matrices of the models' sizes, without memory for them, and count."""
    counted = {
        "GPT-3 175B, r = 4": (_count(96, 12_288, adapt.LoRA(rank=4)), 18_874_368),
        "GPT-3 175B, r = 1": (_count(96, 12_288, adapt.LoRA(rank=1)), 4_718_592),
        "RoBERTa base, r = 8": (_count(12, 768, adapt.LoRA(rank=8)), 294_912),
    }
    with torch.device("meta"):
        small = api.build(api.preset("smollm2-135m"))
    ours = adapt.trainable_parameters(adapt.apply(small, adapt.LoRA(rank=8), QUERY_VALUE))
    counted["SmolLM2-135M, r = 8"] = (ours, 30 * 8 * ((576 + 576) + (576 + 192)))
    lab.table(
        "Trained parameters, adapters on query and value",
        ["model", "counted", "sum of r (d + k)"],
        [[name, found, formula] for name, (found, formula) in counted.items()],
    )
    return lab.judge(
        checks={name: found == formula for name, (found, formula) in counted.items()},
        measured={name: found for name, (found, _) in counted.items()},
    )


def _count(depth: int, dim: int, adapter: adapt.LoRA) -> int:
    """What `adapter` trains on the query and value matrices of `depth` layers of width `dim`."""
    with torch.device("meta"):
        layers = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(dim, dim), "value": nn.Linear(dim, dim)}) for _ in range(depth)
        )
    return adapt.trainable_parameters(adapt.apply(layers, adapter, "*.{query,value}"))


@paper.claim(
    "An adapter changes nothing at first, has rank r, and merges into the weight",
    paper="Section 4.1: B is zero at the start, so is B A; the update is scaled by alpha / r; W0 + B A can be computed "
    "and stored, so that inference costs nothing more",
    kind="exact",
)
def starts_at_zero_and_merges(lab: Lab) -> Verdict:
    """Compare a small model bare, freshly adapted, with a random B, and merged, in float64."""
    spec = replace(api.preset("smollm2-135m"), vocab_size=512, dim=576, depth=2)
    model = api.build(spec).double()
    tokens = torch.randint(512, (2, 12), generator=lab.generator(lab.seed))
    with torch.no_grad():
        bare = model(tokens)
    weights = {path: module.weight.detach().clone() for path, module in _matrices(model).items()}
    adapt.apply(model, adapt.LoRA(rank=4, alpha=12), QUERY_VALUE)
    model.double()
    gradients_of_a = _gradients_at_zero(model, tokens)
    fresh = model(tokens).detach()
    draws = lab.generator(lab.seed)
    for layer in adapt.adapted(model).values():
        assert isinstance(layer.delta, LowRankDelta)
        layer.delta.up.data = 0.1 * torch.randn(layer.delta.up.shape, generator=draws, dtype=torch.float64)
    deltas = {path: layer.delta for path, layer in adapt.adapted(model).items()}
    ranks = [int(torch.linalg.matrix_rank(delta.weight())) for delta in deltas.values()]
    # By hand, with the paper's symbols: (alpha / r) B A.
    by_hand = {path: weights[path] + 12 / 4 * delta.up.detach() @ delta.down.detach() for path, delta in deltas.items()}  # type: ignore[operator]
    with torch.no_grad():
        unmerged = model(tokens)
        merged = adapt.merge(model)(tokens)
    off = max(
        (weight_of(module).detach() - by_hand[path]).abs().max().item() for path, module in _matrices(model).items()
    )
    moved, apart = (unmerged - bare).abs().max().item(), (merged - unmerged).abs().max().item()
    return lab.judge(
        checks={
            "at first no bit of the output changes": torch.equal(fresh, bare),
            "and A has no gradient, because B is zero": gradients_of_a == 0.0,
            "the update has rank 4": set(ranks) == {4},
            # merge rounds W0 + scale B A to float32 before it is stored: 2^-24 of weights below 1, through two layers.
            "merged equals unmerged, to 1e-5": apart < 1e-5,
            "the merged weight is W0 + (alpha / r) B A, to 1e-6": off < 1e-6,
            "which is not what the model was": moved > 1e-2,
        },
        measured={
            "largest difference of logits, merged": apart,
            "largest change of logits by the adapters": moved,
            "largest difference of merged weights": off,
            "ranks": sorted(set(ranks)),
        },
    )


def _matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain query and value layers by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith((".query", ".value"))
    }


def _gradients_at_zero(model: DecoderModel, tokens: Tensor) -> float:
    """The largest gradient of any A while B is zero."""
    model(tokens).square().sum().backward()
    deltas = [layer.delta for layer in adapt.adapted(model).values()]
    return max(delta.down.grad.abs().max().item() for delta in deltas)  # type: ignore[union-attr, operator]
