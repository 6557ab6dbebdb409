"""Feature neighbourhoods and attribution: features split in larger dictionaries, and gradients predict ablations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import interpret, train
from paperworks.interpret import sae
from paperworks.interpret.probing.separation import rank_correlation
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.testbeds import characters as character
from paperworks.testbeds.planted_features import BATCH, settings

paper = Paper(
    key="feature-geometry",
    title="Scaling Monosemanticity: feature neighbourhoods, and features as computational intermediates",
    authors="Templeton, Conerly, Marcus, Lindsey, Bricken, Chen et al.",
    year=2024,
    ref="transformer-circuits.pub/2024/scaling-monosemanticity",
    family="autoencoders",
    summary=(
        "Decoder directions that lie near each other mean related things, one feature of a small dictionary becomes "
        "several in a large one, and activation times gradient tells what switching a feature off will do."
    ),
    implements=(
        "paperworks.interpret.sae.evaluation.geometry.neighbours",
        "paperworks.interpret.sae.evaluation.geometry.project",
        "paperworks.interpret.sae.evaluation.geometry.attribute",
        "paperworks.interpret.sae.evaluation.geometry.ablate",
        "paperworks.interpret.sae.evaluation.planted.Families",
    ),
)

FAMILIES, CHILDREN = 32, 4
NEAR = 0.7  # the cosine from which on a feature counts as one of a family
TAP = "blocks.0"  # the residual stream after the first of two blocks


def _dictionary(lab: Lab, data: sae.Families, latents: int) -> sae.SparseAutoencoder:
    """Train a TopK autoencoder with as many latents on as families are, on average."""
    steps = lab.pick(smoke=10, small=3000)
    torch.manual_seed(lab.seed)
    model = sae.TopK(latents=latents, k=3, aux_k=16, dead_after=20_000).build(data.dim)
    model.centre(data.draw(4096, torch.Generator().manual_seed(lab.seed + 2)))
    training = sae.Training(model, steps)
    with lab.threads(1), lab.progress(f"{latents} latents", steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            advance(1)

        train.fit(
            model,
            training.loss,
            lambda epoch: data.batches(BATCH, steps, seed=lab.seed),
            settings(steps, clip=1.0),
            on_step=after_step,
        )
    return model.eval()


def _parent(rows: Float[Tensor, "latents dim"], data: sae.Families) -> Tensor:
    """Return the family whose parent is nearest to each row."""
    return (nn.functional.normalize(rows, dim=1) @ data.parents.T).argmax(dim=1)


def _family(rows: Float[Tensor, "latents dim"], data: sae.Families) -> Tensor:
    """Return the family of the child nearest to each row; -1 where none is near (a cosine of 0.7)."""
    best, child = (nn.functional.normalize(rows, dim=1) @ data.directions.T).max(dim=1)
    return torch.where(best > NEAR, child // data.children, -1)


@dataclass(frozen=True)
class Split:
    """A small and a large dictionary of the same data, and how the large one's neighbours split the small one's."""

    data: sae.Families
    rows: list[Float[Tensor, "latents dim"]]
    quality: list[sae.Quality]

    def same(self, large: Tensor | None = None, families: Tensor | None = None) -> float:
        """Return the share of the small one's features whose four nearest of the large one are all of their family."""
        large = self.rows[1] if large is None else large
        families = _family(large, self.data) if families is None else families
        near = sae.neighbours(self.rows[0], large, CHILDREN).indices
        return float((families[near] == _parent(self.rows[0], self.data)[:, None]).all(dim=1).double().mean())


def _split(lab: Lab, spread: float) -> Split:
    data = sae.Families(FAMILIES, CHILDREN, spread=spread, seed=lab.seed)
    models = [_dictionary(lab, data, latents) for latents in (FAMILIES, FAMILIES * CHILDREN)]
    fresh = list(data.batches(2048, lab.pick(smoke=1, small=10), seed=lab.seed + 1))
    return Split(data, [model.decoder.detach() for model in models], [sae.measure(model, fresh) for model in models])


@paper.claim(
    "One feature of a small dictionary becomes a family of neighbours in a larger one",
    paper="'Feature neighborhoods' and 'Feature splitting': nearby features are related, and one feature of the 1M "
    "dictionary has several more specific ones near it in the 4M and 34M ones",
    control="the same neighbours among random directions, and among the large dictionary's rows with families shuffled",
)
def features_split(lab: Lab) -> Verdict:
    """Train dictionaries of 32 and 128 on 32 planted families of four, and look up neighbours across them."""
    ours, closer = _split(lab, 1.0), _split(lab, 0.4)
    draws = torch.Generator().manual_seed(lab.seed)
    by_chance = ours.same(torch.randn(ours.rows[1].shape, generator=draws))
    order = torch.randperm(FAMILIES * CHILDREN, generator=draws)
    mixed = ours.same(families=_family(ours.rows[1], ours.data)[order])
    parents = float(sae.best_cosines(ours.data.parents, ours.rows[0]).mean())
    children = float(sae.best_cosines(ours.data.directions, ours.rows[1]).mean())
    _draw_map(lab, ours.rows, ours.data)
    return lab.judge(
        checks={
            "for more than 80% of the small one's features, all four neighbours are their family": ours.same() > 0.8,
            "for fewer than 5% by chance": max(by_chance, mixed) < 0.05,
            "the small dictionary holds parents, cosine above 0.8": parents > 0.8,
            "the large one holds children, cosine above 0.9": children > 0.9,
        },
        measured={
            "features with four neighbours of their family": ours.same(),
            "mean best cosine, parents in the small one": parents,
            "mean best cosine, children in the large one": children,
            "FVU of both": [each.fvu for each in ours.quality],
            "dead of both": [each.dead for each in ours.quality],
            "children at 0.4 of the length beside their parent: with four such neighbours": closer.same(),
        },
        control={"random directions": by_chance, "families shuffled": mixed},
        note="32 random parents in 64 dimensions, each with four children that are the parent plus a random vector of "
        "the same length; a family is on with a chance of 3/32, as one of its children. TopK, k = 3, 3,000 steps. "
        "With 0.4 of that vector a large dictionary keeps a latent on the parent and splits the family less cleanly.",
    )


def _draw_map(lab: Lab, rows: list[Tensor], data: sae.Families) -> None:
    """Draw both dictionaries, a few families in colour: directions in the plane of six families' components."""
    shown = list(range(6))
    families = [_parent(rows[0], data), _family(rows[1], data)]
    chosen = [torch.isin(family, torch.tensor(shown)) for family in families]
    together = torch.cat([each[mask] for each, mask in zip(rows, chosen, strict=True)])
    if len(together) < 3:
        return
    places = sae.project(together)
    split = int(chosen[0].sum())
    with lab.figure("families", figsize=(6.4, 4.4)) as figure:
        axes = figure.subplots()
        for family in shown:
            color = COLORS[family % len(COLORS)]
            first = places[:split][families[0][chosen[0]] == family]
            second = places[split:][families[1][chosen[1]] == family]
            axes.scatter(second[:, 0], second[:, 1], color=color, s=26)
            axes.scatter(first[:, 0], first[:, 1], facecolors="none", edgecolors=color, s=150, linewidths=1.8)
        axes.scatter([], [], facecolors="none", edgecolors=FAINT, s=110, linewidths=1.8, label="32 latents")
        axes.scatter([], [], color=FAINT, s=26, label="128 latents")
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
        axes.set_title("Six families in a small and a large dictionary")
        axes.legend(loc="best")


@dataclass(frozen=True)
class Effects:
    """For sampled (latent, position) pairs: attribution, the true effect, and activation times row length."""

    attributed: list[float]
    true: list[float]
    strength: list[float]


@paper.claim(
    "Activation times gradient predicts what ablating a feature does",
    paper="'Features as computational intermediates': attributions are highly correlated with the effects of ablation "
    "(Pearson 0.8 in its example)",
    control="the features' activation strength alone, without the gradient",
)
def attribution_predicts_ablation(lab: Lab) -> Verdict:
    """Train a two-layer character model and a TopK autoencoder on its first block, then ablate features one by one."""
    model = character.trained(
        lab, character.character_llama(depth=2), lab.pick(smoke=2, small=400), lab.seed, "two-layer character model"
    )
    windows = character.play().train_windows(length=64, batch=16, count=lab.pick(smoke=4, small=80), seed=1)
    batches = [window["tokens"] for window in windows]
    buffer = sae.Activations(model, TAP, batches, size=256, capacity=16_384)
    rows = buffer.normalized(64.0, rows=lab.pick(smoke=256, small=16_384))
    dictionary = _fitted(lab, rows)
    dictionary.rescale(1 / rows.factor)
    effects = _effects(lab, model, dictionary)
    ours = rank_correlation(effects.attributed, effects.true)
    control = rank_correlation(effects.strength, effects.true)
    with lab.figure("attribution", figsize=(5.2, 4.2)) as figure:
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color=CONTROL, linewidth=1, linestyle=":")
        axes.scatter(effects.attributed, effects.true, color=COLORS[0], s=12, alpha=0.7, linewidths=0, rasterized=True)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_xlabel("attribution: activation times gradient")
        axes.set_ylabel("effect of ablating the feature")
        axes.set_title("Effect on the logit difference of the next character")
    return lab.judge(
        checks={
            "rank correlation with the true effects above 0.9": ours > 0.9,
            "strength alone stays below 0.5": control < 0.5,
        },
        measured={"Spearman": ours, "pairs": len(effects.true), "largest effect": max(map(abs, effects.true))},
        control={"Spearman, strength alone": control},
        note="Effects on the logit of the right next character minus that of the best other one; the reconstruction's "
        "error is kept when a feature is ablated.",
    )


def _fitted(lab: Lab, rows: sae.Activations) -> sae.SparseAutoencoder:
    steps = lab.pick(smoke=4, small=600)
    torch.manual_seed(lab.seed)
    model = sae.TopK(latents=256, k=8, aux=0.0).build(64)
    training = sae.Training(model, steps)
    data = rows.gather(lab.pick(smoke=512, small=80_000))

    def batches(epoch: int) -> list[Tensor]:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
        return [data[part] for part in order[: len(order) // 256 * 256].split(256)]

    with lab.threads(1), lab.progress("its dictionary", steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            advance(1)

        train.fit(model, training.loss, batches, settings(steps, clip=1.0), on_step=after_step)
    return model.eval()


def _effects(lab: Lab, model: nn.Module, dictionary: sae.SparseAutoencoder) -> Effects:
    """Attribute and ablate a sample of the features that are on, for the last character of held-out windows."""
    windows = character.play().held_out_windows(length=64, count=lab.pick(smoke=2, small=12))
    chooser = random.Random(lab.seed)
    effects = Effects([], [], [])
    inputs = [
        (tokens[None], int(targets[-1]))
        for each in windows
        for tokens, targets in zip(each["tokens"], each["targets"], strict=True)
    ]
    for tokens, right in lab.track(inputs, "ablations"):
        with interpret.record(model, TAP) as seen, torch.no_grad():
            logits = model(tokens)[0, -1]
        strength = dictionary.strength(dictionary.encode(seen[TAP]))[0].detach()
        logits[right] = -torch.inf
        difference = partial(_difference, right=right, rival=int(logits.argmax()))
        parts = sae.attribute(model, TAP, dictionary, tokens, difference).latents[0]
        on = strength.nonzero().tolist()
        for position, latent in chooser.sample(on, min(len(on), lab.pick(smoke=3, small=25))):
            effects.attributed.append(float(parts[position, latent]))
            effects.true.append(sae.ablate(model, TAP, dictionary, tokens, difference, latent, position))
            effects.strength.append(float(strength[position, latent]))
    return effects


def _difference(logits: Float[Tensor, "1 time vocab"], right: int, rival: int) -> Tensor:
    return logits[0, -1, right] - logits[0, -1, rival]


@paper.claim(
    "Attributions add up, and are ablations where the metric is linear",
    paper="Attribution of feature i is f_i (W_dec,i . dm/dx), the gradient taken in the clean run; with the error and "
    "the decoder's bias it makes up x . dm/dx",
    kind="exact",
)
def attributions_add_up(lab: Lab) -> Verdict:
    """Check completeness on a random transformer and equality with ablation behind a linear map, in float64."""
    torch.manual_seed(lab.seed)
    model = character.character_llama(depth=2).build().double().eval()
    dictionary = sae.Standard(latents=256, penalty=1.0).build(64).double().eval()
    with torch.no_grad():
        dictionary.decoder_bias.normal_(std=0.3)
    tokens = torch.arange(20)[None]
    difference = partial(_difference, right=3, rival=5)
    parts = sae.attribute(model, TAP, dictionary, tokens, difference)
    with interpret.record(model, TAP, detach=False) as seen:
        metric = difference(model(tokens))
    (gradient,) = torch.autograd.grad(metric, seen[TAP])
    whole = (seen[TAP] * gradient).sum(dim=-1)
    missing = float((parts.latents.sum(dim=-1) + parts.error + parts.bias - whole).detach().abs().max())
    linear = nn.Sequential(nn.Identity(), nn.Linear(64, 9)).double()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    direct = sae.attribute(linear, "0", dictionary, x, difference)
    apart = max(
        abs(sae.ablate(linear, "0", dictionary, x, difference, latent, 4) - float(direct.latents[0, 4, latent]))
        for latent in range(0, 256, 16)
    )
    rows = dictionary.decoder.detach()
    stretched = rows * (0.1 + torch.rand(256, 1, dtype=torch.float64))
    same = torch.equal(sae.neighbours(rows).indices, sae.neighbours(stretched).indices)
    return lab.judge(
        checks={
            "latents, error and bias add up to x . gradient, to 1e-12": missing < 1e-12,
            "attribution equals ablation for a linear metric, to 1e-12": apart < 1e-12,
            "neighbours do not depend on the rows' lengths": same,
        },
        measured={"missing from the sum": missing, "difference from ablation": apart},
    )
