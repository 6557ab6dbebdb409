"""Stitching autoencoders of different sizes: what a larger dictionary has that a smaller one lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret import sae
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds.planted_features import trained

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
    equation=r"c_i = \max_j \cos(W^B_{\mathrm{dec},i}, W^S_{\mathrm{dec},j}), \qquad "
    r"i \text{ is novel where } c_i < 0.7",
    usage="""
import torch
from paperworks.interpret import sae

small, large = sae.Gated(latents=24, penalty=1.0).build(64), sae.Gated(latents=40, penalty=1.0).build(64)
x = sae.Planted(mean_square=64.0).draw(512, torch.Generator().manual_seed(0))
novel = sae.nearest_cosines(large, small) < 0.7  # of the large one's 40 latents
stitched = sae.stitch(small, large, novel)       # the small one and what it has not
print(stitched.latents, "latents; each alone changes the error by", sae.insertion_effects(small, large, x)[:3])
for step in sae.interpolate(small, large, 0.7, x, stride=16):
    print(step.latents, "latents on the way to the large one")
""",
    notes=(
        "Gated autoencoders, which do not shrink: where features are too small, putting one in twice lowers the error "
        "and the test turns round. Planted directions, frequent and rare, instead of GPT-2's activations."
    ),
)

NOVEL_BELOW = 0.7  # the authors' threshold of the cosine
SMALL, LARGE = 96, 256
FREQUENT, RARE = 4 / 128, 1 / 128  # the chance of being on


def _data(seed: int) -> sae.Planted:
    """128 directions that are on often and 128 that are on seldom."""
    rate = torch.tensor([FREQUENT] * 128 + [RARE] * 128)
    return sae.Planted(256, 64, rate, mean_square=64.0, seed=seed)


@dataclass(frozen=True)
class Pair:
    """A small and a large autoencoder, what the living latents of the large one are, and fresh activations."""

    small: sae.SparseAutoencoder
    large: sae.SparseAutoencoder
    novel: Float[Tensor, " novel"]  # latents of the large one
    known: Float[Tensor, " known"]
    fresh: Float[Tensor, "inputs 64"]
    directions: Float[Tensor, "256 64"]

    def fvu(self, model: sae.SparseAutoencoder) -> float:
        """Variance that a model leaves unexplained."""
        return sae.measure(model, self.fresh.split(2048)).fvu


@cache
def _pair(lab: Lab, seed: int) -> Pair:
    """Train both on the same activations; gated, which reconstruct at full size."""
    data = _data(seed)
    small, large = (
        trained(
            lab,
            sae.Gated(latents=count, penalty=4.0).build,
            f"{count} latents",
            steps=1500,
            data=data,
            beta1=0.0,
            seed=seed,
        )
        for count in (SMALL, LARGE)
    )
    alive, cosines = large.quality.density > 0, sae.nearest_cosines(large.model, small.model)
    novel, known = ((chosen & alive).nonzero().flatten() for chosen in (cosines < NOVEL_BELOW, cosines >= NOVEL_BELOW))
    fresh = data.draw(lab.pick(smoke=512, small=20_000), lab.generator(seed + 3))
    return Pair(small.model, large.model, novel, known, fresh, data.directions)


@paper.claim(
    "What a larger dictionary has new lowers a smaller one's error; what it repeats raises it",
    paper="'Stitching': adding novel features (cosine below 0.7 to all of the smaller one's) improves the error, "
    "adding reconstruction features makes it worse; about 35% of GPT-2's larger dictionaries is novel",
    control="as many reconstruction features instead of the novel ones",
)
def novel_features_help(lab: Lab) -> Verdict:
    """Stitch both kinds of features into the small autoencoder, and measure each one alone too."""

    def arm(novel: bool) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            with lab.threads(1):
                pair = _pair(lab, seed)
                kind = pair.novel if novel else pair.known
                # All novel ones, and as many of the others, as far as there are.
                put_in = kind[torch.randperm(len(kind), generator=lab.generator(seed))[: len(pair.novel)]]
                base, stitched = pair.fvu(pair.small), pair.fvu(sae.stitch(pair.small, pair.large, put_in))
                alone = sae.insertion_effects(pair.small, pair.large, pair.fresh)[kind]
            return {
                "change of FVU, percent": 100 * (stitched / base - 1),
                "lower the error alone, share": int((alone < 0).sum()) / max(len(kind), 1),
                "features put in": len(put_in),
                "share of the large one's living features": len(kind) / (len(pair.novel) + len(pair.known)),
                "FVU of the small one": base,
                "FVU of the large one": pair.fvu(pair.large),
            }

        return run

    ours, control = "novel features", "as many reconstruction features"
    verdict = lab.compare(
        arms={ours: arm(True), control: arm(False)},
        main=Beats(ours, control, on="change of FVU, percent", by=20, lower=True),
        also=[
            AtMost(ours, -10, on="change of FVU, percent"),
            AtLeast(control, 5, on="change of FVU, percent"),
            AtLeast(ours, 0.85, on="lower the error alone, share"),
            AtMost(control, 0.15, on="lower the error alone, share"),
        ],
        seeds=3,
        note=f"256 directions in 64 dimensions, 128 on with a chance of {FREQUENT:.1%}, 128 of {RARE:.1%}; gated, "
        f"penalty 4, {SMALL} and {LARGE} latents, 2,000 steps. Dead latents are left out. All novel features are "
        "put in, and of the others as many, or all where there are fewer.",
    )
    lab.points("change of FVU, percent", name="stitching", title="Change of the small one's FVU, percent")
    return verdict


@paper.claim(
    "Stitching nothing is the small autoencoder, swapping everything the large one, and doubling has its threshold",
    paper="Interpolation ends at the larger autoencoder; a feature put in again doubles its part",
    kind="exact",
)
def ends_are_exact(lab: Lab) -> Verdict:
    """Check both ends, single insertions against really inserting, and the two-thirds rule, in float64."""
    torch.manual_seed(lab.seed)
    x = _data(lab.seed).draw(512, torch.Generator().manual_seed(1)).double()
    small, large = (sae.Gated(latents=latents, penalty=1.0).build(64).double().eval() for latents in (24, 40))
    with torch.no_grad():
        for model in (small, large):
            for name in (*model.latent_biases(), "decoder_bias"):
                model.get_parameter(name).normal_(std=0.3)
        nothing = float((sae.stitch(small, large, torch.arange(0))(x) - small(x)).abs().max())
        whole = sae.stitch(small, large, torch.arange(40), torch.arange(24), bias=large.decoder_bias.detach())
        everything = float((whole(x) - large(x)).abs().max())
        *_, last = sae.interpolate(small, large, NOVEL_BELOW, x)
        arrived = float((last(x) - large(x)).abs().max())
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
            "so does the way through all features": arrived < 1e-12,
            "effects are those of really inserting, to 1e-10": apart < 1e-10,
            "cosines do not depend on the order of features": cosines < 1e-12,
            "doubling hurts from two thirds of the true size on": [change > 0 for change in doubled.values()]
            == [False, False, True, True],
        },
        measured={
            "difference at the start": nothing,
            "difference at the end": everything,
            "difference at the end of the way": arrived,
            "largest error of an effect": apart,
            "effect of doubling at 0.5, 0.66, 0.67, 1": list(doubled.values()),
        },
    )


def _doubling(size: float) -> float:
    """The effect of inserting an isolated feature again that is reconstructed at `size` of its true size."""
    model = sae.Standard(latents=1, penalty=0.0).build(2).double()
    with torch.no_grad():
        model.decoder.copy_(torch.tensor([[1.0, 0.0]]))
        model.encoder.copy_(size * model.decoder)
    return float(sae.insertion_effects(model, model, torch.tensor([[3.0, 0.0]], dtype=torch.float64))[0])
