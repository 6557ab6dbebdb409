"""Stitching autoencoders of different sizes: what a larger dictionary has that a smaller one lacks."""

from __future__ import annotations

from functools import partial

import torch

from paperworks.interpret import sae
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds.planted_features import Trained, trained

paper = Paper(
    key="sae-stitching",
    title="Stitching SAEs of different sizes",
    authors="Bussmann, Leask, Bloom, Tigges, Nanda",
    year=2024,
    ref="alignmentforum.org/posts/baJyjpktzmcmRfosq",
    family="autoencoders",
    summary=(
        "Some features of a larger autoencoder say what the smaller one could not, others repeat or split what it had. "
        "Putting them into it one by one tells which, and leads from one dictionary to the other."
    ),
    implements=(
        "paperworks.interpret.sae.evaluation.stitching.stitch",
        "paperworks.interpret.sae.evaluation.stitching.insertion_effects",
        "paperworks.interpret.sae.evaluation.stitching.nearest_cosines",
        "paperworks.interpret.sae.evaluation.stitching.interpolate",
    ),
)

NOVEL_BELOW = 0.7  # the authors' threshold of the cosine
SMALL, LARGE = 96, 256
STRIDE = 8  # changes between two points of the way
FREQUENT, RARE = 4 / 128, 1 / 128  # the chance of being on


def _data(lab: Lab) -> sae.Planted:
    """128 directions that are on often and 128 that are on seldom."""
    rate = torch.tensor([FREQUENT] * 128 + [RARE] * 128)
    return sae.Planted(256, 64, rate, mean_square=64.0, seed=lab.seed)


def _pair(lab: Lab, penalty: float = 4.0) -> tuple[Trained, Trained]:
    """Train the small and the large one; both gated, which reconstruct at full size."""
    data = _data(lab)
    small, large = (
        trained(lab, sae.Gated(latents=latents, penalty=penalty).build, f"{latents} latents", data=data, beta1=0.0)
        for latents in (SMALL, LARGE)
    )
    return small, large


@paper.claim(
    "What a larger dictionary has new lowers a smaller one's error; what it repeats raises it",
    paper="'Stitching': adding novel features (cosine below 0.7 to all of the smaller one's) improves the error, "
    "adding reconstruction features makes it worse; about 35% of GPT-2's larger dictionaries is novel",
    control="as many reconstruction features instead of the novel ones",
)
def novel_features_help(lab: Lab) -> Verdict:
    """Stitch both kinds of features into the small autoencoder, and compare labels with each feature's own effect."""
    small, large = _pair(lab)
    data = small.data
    fresh = data.draw(lab.pick(smoke=512, small=20_000), torch.Generator().manual_seed(lab.seed + 3))
    alive = large.quality.density > 0
    cosines = sae.nearest_cosines(large.model, small.model)
    effects = sae.insertion_effects(small.model, large.model, fresh)
    novel = (cosines < NOVEL_BELOW) & alive
    known = (cosines >= NOVEL_BELOW) & alive
    order = cosines.where(known, torch.tensor(-1.0)).argsort(descending=True)
    count = min(int(novel.sum()), int(known.sum()))
    measure = partial(sae.measure, batches=list(fresh.split(2048)))
    base = measure(small.model).fvu
    with_novel = measure(sae.stitch(small.model, large.model, novel)).fvu
    fewer = effects.where(novel, torch.tensor(torch.inf)).argsort()[:count]
    same_number = measure(sae.stitch(small.model, large.model, fewer)).fvu
    with_known = measure(sae.stitch(small.model, large.model, order[:count])).fvu
    agreement = float(((effects < 0) == novel)[alive].double().mean())
    rare = sae.best_cosines(large.model.decoder.detach()[novel], data.directions[128:]) if count else torch.zeros(1)
    frequent = sae.best_cosines(large.model.decoder.detach()[novel], data.directions[:128]) if count else rare
    way = _way(lab, small, large, fresh)
    new = int((cosines <= NOVEL_BELOW).sum())  # dead ones included, as on the way
    _draw(lab, cosines[alive], effects[alive], way, new)
    return lab.judge(
        checks={
            "novel features lower FVU by more than 10%": with_novel < 0.9 * base,
            "as many reconstruction features raise it": with_known > base,
            "label and effect agree for more than 85% of the features": agreement > 0.85,
            "the way through all of them ends at the large one": abs(way[-1][1] - measure(large.model).fvu) < 1e-5,
        },
        measured={
            "FVU of the small one": base,
            "FVU with the novel features": with_novel,
            "novel features": int(novel.sum()),
            "reconstruction features": int(known.sum()),
            "label and effect agree": agreement,
            "novel features that are rare directions": float((rare > frequent).double().mean()),
            "FVU of the large one": measure(large.model).fvu,
        },
        control={
            "FVU with as many reconstruction features": with_known,
            "number put in": count,
            "FVU with as many novel ones": same_number,
        },
        note=f"256 directions in 64 dimensions, 128 on with a chance of {FREQUENT:.1%}, 128 of {RARE:.1%}; gated, "
        f"penalty 4, {SMALL} and {LARGE} latents, 2,000 steps. Dead latents are left out.",
    )


def _way(lab: Lab, small: Trained, large: Trained, fresh: torch.Tensor) -> list[tuple[float, float, int]]:
    """Return L0, FVU and size of the autoencoders between the small and the large one."""
    sample = fresh[:4096]
    path = sae.interpolate(small.model, large.model, NOVEL_BELOW, sample, stride=lab.pick(smoke=100, small=STRIDE))
    found = []
    for model in path:
        quality = sae.measure(model, fresh.split(2048))
        found.append((quality.l0, quality.fvu, model.latents))
    return found


def _draw(
    lab: Lab, cosines: torch.Tensor, effects: torch.Tensor, way: list[tuple[float, float, int]], new: int
) -> None:
    with lab.figure("stitching", figsize=(8.8, 3.5)) as figure:
        single, path = figure.subplots(1, 2)
        novel = cosines < NOVEL_BELOW
        for mask, color, label in ((novel, COLORS[0], "novel"), (~novel, CONTROL, "reconstruction")):
            single.scatter(cosines[mask], effects[mask], color=color, s=14, alpha=0.8, linewidths=0, label=label)
        single.axhline(0, color=INK, linewidth=0.8)
        single.axvline(NOVEL_BELOW, color=INK, linewidth=0.8, linestyle=":")
        single.set_xlabel("largest cosine with a small one's feature")
        single.set_title("Change of the error, one feature put in")
        single.legend(loc="upper left")
        sizes = [size for _, _, size in way]
        path.plot(range(len(way)), [fvu for _, fvu, _ in way], color=COLORS[0], marker="o", ms=3)
        turn = min(new // STRIDE, len(way) - 1)
        path.axvline(turn, color=INK, linewidth=0.8, linestyle=":")
        path.set_ylim(bottom=0)
        path.set_xticks([])
        path.set_xlabel(f"from {sizes[0]} latents, over {sizes[turn]} (dotted), to {sizes[-1]}")
        path.set_title("FVU on the way: add the novel, then swap")


@paper.claim(
    "Stitching nothing is the small autoencoder, swapping everything the large one, and doubling has its threshold",
    paper="Interpolation ends at the larger autoencoder; a feature put in again doubles its part",
    kind="exact",
)
def ends_are_exact(lab: Lab) -> Verdict:
    """Check both ends, single insertions against really inserting, and the two-thirds rule, in float64."""
    torch.manual_seed(lab.seed)
    x = _data(lab).draw(512, torch.Generator().manual_seed(1)).double()
    small, large = (sae.Gated(latents=latents, penalty=1.0).build(64).double().eval() for latents in (24, 40))
    with torch.no_grad():
        for model in (small, large):
            for name in (*model.latent_biases(), "decoder_bias"):
                model.get_parameter(name).normal_(std=0.3)
        nothing = float((sae.stitch(small, large, torch.arange(0))(x) - small(x)).abs().max())
        whole = sae.stitch(small, large, torch.arange(40), torch.arange(24), bias=large.decoder_bias.detach())
        everything = float((whole(x) - large(x)).abs().max())
        effects = sae.insertion_effects(small, large, x)
        apart = 0.0
        before = (x - small(x)).square().sum(dim=1).mean()
        for index in range(40):
            inserted = sae.stitch(small, large, torch.tensor([index]))
            change = (x - inserted(x)).square().sum(dim=1).mean() - before
            apart = max(apart, float((change - effects[index]).abs()))
        shuffled = sae.stitch(small, small, torch.randperm(24), torch.arange(24))
        cosines = float((sae.nearest_cosines(large, shuffled) - sae.nearest_cosines(large, small)).abs().max())
    doubled = {size: _doubling(size) for size in (0.5, 0.66, 0.67, 1.0)}
    return lab.judge(
        checks={
            "stitching nothing changes nothing": nothing == 0.0,
            "swapping everything gives the large one, to 1e-12": everything < 1e-12,
            "effects are those of really inserting, to 1e-10": apart < 1e-10,
            "cosines do not depend on the order of features": cosines < 1e-12,
            "doubling hurts from two thirds of the true size on": [change > 0 for change in doubled.values()]
            == [False, False, True, True],
        },
        measured={
            "difference at the start": nothing,
            "difference at the end": everything,
            "largest error of an effect": apart,
            "effect of doubling at 0.5, 0.66, 0.67, 1": list(doubled.values()),
        },
    )


def _doubling(size: float) -> float:
    """Return the effect of inserting an isolated feature again that is reconstructed at `size` of its true size."""
    model = sae.Standard(latents=1, penalty=0.0).build(2).double()
    with torch.no_grad():
        model.decoder.copy_(torch.tensor([[1.0, 0.0]]))
        model.encoder.copy_(size * model.decoder)
    return float(sae.insertion_effects(model, model, torch.tensor([[3.0, 0.0]], dtype=torch.float64))[0])
