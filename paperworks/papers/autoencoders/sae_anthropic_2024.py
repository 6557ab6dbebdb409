"""Scaling Monosemanticity's autoencoder: free decoder lengths, weighed in the penalty."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret import sae
from paperworks.interpret.sae.autoencoder import Metrics, squared_error, warmed
from paperworks.interpret.sae.kinds.standard import StandardAutoencoder
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.planted_features import COLUMNS, SETTING, Trained, settings, trained

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
)

PENALTIES = (2.0, 5.0)  # 5 is the paper's


class Unweighted(StandardAutoencoder):
    """The control: the same autoencoder, free lengths included, without ||W_dec,i|| in the penalty."""

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """Return mean ||x - x'||^2 + penalty * mean sum f."""
        latents = self.encode(x)
        self.see(latents)
        error = squared_error(x, self.decode(latents))
        sparsity = latents.sum(dim=-1).mean()
        return error + warmed(self.spec.penalty, self.spec.warmup, progress) * sparsity, {"error": error.detach()}


def _spec(penalty: float) -> sae.Standard:
    return sae.Standard(latents=256, penalty=penalty, decoder="weighted", warmup=0.05)


def _length(run: Trained) -> float:
    return float(run.model.decoder.detach().norm(dim=1).mean())


@paper.claim(
    "With decoder lengths in the penalty, planted directions are found and no latent dies without resampling",
    paper="'Scaling Monosemanticity' and the April 2024 update: the sparsity term weighs f_i by ||W_dec,i||; about 2% "
    "dead features in the smallest of its dictionaries, without resampling",
    control="the same with sum f_i as the penalty: latents escape it by growing their decoder rows",
)
def finds_planted_directions(lab: Lab) -> Verdict:
    """Train at two penalties and without the lengths in the penalty; compare with what was planted."""
    runs = {penalty: trained(lab, _spec(penalty).build, f"penalty {penalty:g}", clip=1.0) for penalty in PENALTIES}
    control = trained(lab, partial(Unweighted, _spec(PENALTIES[0])), "lengths not in the penalty", clip=1.0)
    ours = runs[PENALTIES[0]]
    _draw(lab, ours, control)
    lab.table(
        "What was trained",
        ["penalty", *COLUMNS, "mean length"],
        [
            *([f"{penalty:g} sum f ||W_dec||", *run.row, _length(run)] for penalty, run in runs.items()),
            [f"{PENALTIES[0]:g} sum f (control)", *control.row, _length(control)],
        ],
    )
    return lab.judge(
        checks={
            "mean best cosine above 0.85 at both penalties": all(run.recovery.mmcs > 0.85 for run in runs.values()),
            "fewer than 5% dead at both": all(run.quality.dead < 0.05 for run in runs.values()),
            "the control's decoder rows are more than twice as long": _length(control) > 2 * _length(ours),
            "the control's L0 is more than five times as high": control.quality.l0 > 5 * ours.quality.l0,
        },
        measured={
            "penalties": list(PENALTIES),
            "mean best cosine": [run.recovery.mmcs for run in runs.values()],
            "directions recovered": [run.recovery.share for run in runs.values()],
            "L0": [run.quality.l0 for run in runs.values()],
            "FVU": [run.quality.fvu for run in runs.values()],
            "dead": [run.quality.dead for run in runs.values()],
            "mean length of decoder rows": [_length(run) for run in runs.values()],
        },
        control={
            "mean best cosine": control.recovery.mmcs,
            "directions recovered": control.recovery.share,
            "L0": control.quality.l0,
            "FVU": control.quality.fvu,
            "mean length of decoder rows": _length(control),
        },
        note=SETTING + " Gradients clipped to 1. Mean ||x||^2 of 64; 2,000 steps. Recovered: a cosine above 0.9.",
    )


def _draw(lab: Lab, ours: Trained, control: Trained) -> None:
    best = [sae.best_cosines(run.data.directions, run.model.decoder) for run in (ours, control)]
    random = sae.best_cosines(ours.data.directions, torch.randn(256, 64, generator=torch.Generator().manual_seed(9)))
    with lab.figure("recovered", figsize=(7.6, 3.4)) as figure:
        axes = figure.subplots()
        edges = [index / 40 for index in range(8, 41)]
        lines = (
            (best[0], COLORS[0], f"lengths in the penalty (L0 {ours.quality.l0:.1f})"),
            (best[1], COLORS[1], f"lengths left out (L0 {control.quality.l0:.0f})"),
            (random, CONTROL, "random rows"),
        )
        for values, color, label in lines:
            axes.hist(values.tolist(), edges, color=color, alpha=0.75, label=label)
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
    x = data.draw(512, torch.Generator().manual_seed(1)).double()
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
    mean_square = float(
        data.draw(lab.pick(smoke=20_000, small=400_000), torch.Generator().manual_seed(2)).square().sum(1).mean()
    )
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
