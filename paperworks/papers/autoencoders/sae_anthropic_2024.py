"""Scaling Monosemanticity's autoencoder: free decoder lengths, weighed in the penalty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret import sae
from paperworks.interpret.sae.autoencoder import Metrics, squared_error, warmed
from paperworks.interpret.sae.kinds.standard import StandardAutoencoder
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.planted_features import SETTING, settings, trained

paper = Paper(
    key="sae-anthropic-2024",
    title="Scaling Monosemanticity: Extracting Interpretable Features from Claude 3 Sonnet",
    authors="Templeton, Conerly, Marcus, Lindsey, Bricken, Chen et al.; Conerly et al. (Circuits Updates)",
    year=2024,
    ref="transformer-circuits.pub/2024/scaling-monosemanticity; Circuits Updates, April 2024 (training details)",
    family="autoencoders",
    summary=(
        "Weighing each latent by the length of its decoder row in the L1 penalty makes it pointless to trade length "
        "between encoder and decoder, so no norm must be enforced, nothing dies, and dead latents need no resampling."
    ),
    implements=(
        "paperworks.interpret.sae.kinds.standard.Standard",
        "paperworks.interpret.sae.activations.Activations",
        "paperworks.interpret.sae.evaluation.planted.Planted",
        "paperworks.interpret.sae.evaluation.measures.measure",
    ),
    equation=r"\mathcal{L} = \mathbb{E}_x \Big[ \lVert x - \hat x \rVert^2 + \lambda \sum_i f_i(x) "
    r"\lVert W_{\mathrm{dec},i} \rVert \Big]",
    usage="""
import torch
from paperworks.interpret import sae

data = sae.Planted(mean_square=64.0)  # activations whose directions are known; 64 dimensions
model = sae.Standard(latents=256, penalty=2.0, decoder="weighted").build(64)
adam = torch.optim.Adam(model.parameters(), lr=2e-3)
for x in data.batches(512, 300, seed=0):
    adam.zero_grad()
    model.loss(x, progress=1.0)[0].backward()
    adam.step()
model.fold_norms()  # unit decoder rows; outputs stay as they are
print(sae.recovery(data.directions, model))
""",
    notes=(
        "A penalty means something only together with the scale of the activations: 5 is the paper's, for a mean "
        "||x||^2 of the dimension. The paper's share of dead features grows with the dictionary (2%, 35%, 65%); 256 "
        "latents say nothing about that."
    ),
)


STEPS = 1500


class Unweighted(StandardAutoencoder):
    """The control: the same autoencoder, free lengths included, without ||W_dec,i|| in the penalty."""

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean ||x - x'||^2 + penalty * mean sum f."""
        latents = self.encode(x)
        self.see(latents)
        error = squared_error(x, self.decode(latents))
        sparsity = latents.sum(dim=-1).mean()
        return error + warmed(self.spec.penalty, self.spec.warmup, progress) * sparsity, {"error": error.detach()}


def _spec(penalty: float) -> sae.Standard:
    return sae.Standard(latents=256, penalty=penalty, decoder="weighted", warmup=0.05)


@paper.claim(
    "With decoder lengths in the penalty, planted directions are found and no latent dies without resampling",
    paper="'Scaling Monosemanticity' and the April 2024 update: the sparsity term weighs f_i by ||W_dec,i||; about 2% "
    "dead features in the smallest of its dictionaries, without resampling",
    control="the same with sum f_i as the penalty: latents escape it by growing their decoder rows",
)
def finds_planted_directions(lab: Lab) -> Verdict:
    """Train with and without the lengths in the penalty; compare with what was planted."""
    best: dict[str, Tensor] = {}

    def arm(name: str, build: Callable[[int], sae.SparseAutoencoder]) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            done = trained(lab, build, name, steps=STEPS, clip=1.0, seed=seed)
            best.setdefault(name, sae.best_cosines(done.data.directions, done.model.decoder.detach()))
            return {
                "mean best cosine": done.recovery.mmcs,
                "directions recovered": done.recovery.share,
                "L0": done.quality.l0,
                "FVU": done.quality.fvu,
                "dead": done.quality.dead,
                "mean length of decoder rows": float(done.model.decoder.detach().norm(dim=1).mean()),
            }

        return run

    ours, papers = "lengths in the penalty, 2", "lengths in the penalty, 5"  # 5 is the paper's
    control, strong = "lengths left out, 2", "lengths left out, 20"  # 20: does a larger penalty stop the escape?
    verdict = lab.compare(
        arms={
            ours: arm(ours, _spec(2.0).build),
            papers: arm(papers, _spec(5.0).build),
            control: arm(control, partial(Unweighted, _spec(2.0))),
            strong: arm(strong, partial(Unweighted, _spec(20.0))),
        },
        main=Beats(ours, control, on="mean best cosine", by=0.2),
        also=[
            Beats(papers, control, on="mean best cosine", by=0.15),
            Beats(ours, strong, on="mean best cosine", by=0.2),
            Beats(ours, control, on="L0", by_ratio=0.8, lower=True),
            Beats(ours, control, on="mean length of decoder rows", by_ratio=0.5, lower=True),
            AtMost(ours, 0.05, on="dead"),
            AtMost(papers, 0.05, on="dead"),
        ],
        seeds=3,
        note=SETTING + f" Gradients clipped to 1. Mean ||x||^2 of 64; {STEPS:,} steps. Recovered: a cosine above 0.9.",
    )
    _draw(lab, {name: best[name] for name in (ours, control)})
    return verdict


def _draw(lab: Lab, best: dict[str, Tensor]) -> None:
    random = sae.best_cosines(
        torch.randn(256, 64, generator=lab.generator(8)), torch.randn(256, 64, generator=lab.generator(9))
    )
    with lab.figure("recovered", figsize=(7.6, 3.4)) as figure:
        axes = figure.subplots()
        edges = [index / 40 for index in range(8, 41)]
        for (name, values), color in zip(
            [*best.items(), ("random rows", random)], (COLORS[0], COLORS[1], CONTROL), strict=True
        ):
            axes.hist(values.tolist(), edges, color=color, alpha=0.75, label=name)
        axes.set_xlabel("cosine with the nearest decoder row")
        axes.set_ylabel("planted directions")
        axes.set_title("How well each of 256 planted directions is found")
        axes.legend(loc="upper left")


@paper.claim(
    "The loss does not see where the length is, one scalar normalizes the data, and both fold away",
    paper="April 2024 update: decoder norms are unconstrained; activations are scaled so that the mean of ||x||^2 is "
    "the dimension; unit decoder columns are restored after training; lambda rises over the first 5% of steps, the "
    "learning rate falls to zero over the last 20%",
    kind="exact",
)
def lengths_and_scale_fold_away(lab: Lab) -> Verdict:
    """Move length around, fold it and the scale away, and read both schedules, in float64."""
    torch.manual_seed(lab.seed)
    data = sae.Planted(mean_square=64.0)
    x = data.draw(512, lab.generator(1)).double()
    model = _spec(5.0).build(64).double()
    with torch.no_grad():
        model.encoder_bias.normal_()
        model.decoder_bias.normal_()
        loss, strength, output = model.loss(x, 1.0)[0], model.strength(model.encode(x)), model(x)
        moved = 0.1 + 5 * torch.rand(256, dtype=torch.float64)
        model.encoder.mul_(moved[:, None])
        model.encoder_bias.mul_(moved)
        model.decoder.div_(moved[:, None])
        loss_change = float((model.loss(x, 1.0)[0] / loss - 1).abs())
        strength_change = float((model.strength(model.encode(x)) - strength).abs().max())
        assert isinstance(model, StandardAutoencoder)
        model.fold_norms()
        folded = float((model(x) - output).abs().max())
        lengths = float((model.decoder.norm(dim=1) - 1).abs().max())
        scale = data.factor
        model.rescale(1 / scale)
        unscaled = float((scale * model(x / scale) - output).abs().max())
    mean_square = float(data.draw(lab.pick(smoke=20_000, small=400_000), lab.generator(2)).square().sum(1).mean())
    shares = (0.0, 0.025, 0.05, 0.8, 0.9, 1.0)
    penalties = [warmed(5.0, 0.05, share) for share in shares]
    recipe = settings(1000)
    rates = [recipe.factor(round(share * 1000)) for share in shares]
    return lab.judge(
        checks={
            "moving length changes the loss by less than 1e-12 of it": loss_change < 1e-12,
            "nor f ||W_dec||, to 1e-12": strength_change < 1e-12,
            "folded to unit rows, outputs are the same to 1e-12": folded < 1e-12 and lengths < 1e-12,
            "with the scale folded back, raw activations give the same": unscaled < 1e-12,
            "the mean of ||x||^2 is the dimension, to 1%": abs(mean_square / 64 - 1) < 0.01,
            "lambda is 0, 2.5, 5, 5, 5, 5": penalties == [0.0, 2.5, 5.0, 5.0, 5.0, 5.0],
            "the rate is 1, 1, 1, 1, 0.5, 0 of its peak": max(
                abs(rate - wanted) for rate, wanted in zip(rates, (1, 1, 1, 1, 0.5, 0), strict=True)
            )
            < 1e-12,
        },
        measured={
            "change of the loss, relative": loss_change,
            "change of f ||W_dec||": strength_change,
            "change of outputs when folded": folded,
            "change of outputs with the scale folded back": unscaled,
            "mean ||x||^2": mean_square,
            "shares of training": list(shares),
            "lambda": penalties,
            "learning rate / peak": rates,
        },
    )
