"""TopK autoencoders: sparsity by construction, and an auxiliary loss that keeps latents alive."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from paperworks.interpret import sae
from paperworks.interpret.sae.kinds import sparse
from paperworks.interpret.sae.kinds.topk import TopKAutoencoder
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.planted_features import BATCH, COLUMNS, SETTING, Trained, trained

paper = Paper(
    key="topk-sae",
    title="Scaling and Evaluating Sparse Autoencoders",
    authors="Gao, Dupr\u00e9 la Tour, Tillman, Goh, Troll, Radford, Sutskever, Leike, Wu",
    year=2024,
    ref="arXiv:2406.04093",
    family="autoencoders",
    summary=(
        "Keeping the k largest pre-activations fixes sparsity instead of tuning a penalty for it, nothing shrinks, and "
        "an auxiliary loss lets dead latents explain what the living ones leave, so that dictionaries can be large."
    ),
    implements=(
        "paperworks.interpret.sae.kinds.topk.TopK",
        "paperworks.interpret.sae.kinds.sparse.largest",
        "paperworks.interpret.sae.kinds.sparse.decode",
        "paperworks.interpret.sae.kinds.topk.normalized_error",
    ),
)

K = 5  # as many directions as are on at a time, on average
DEAD_AFTER = 20_000
TUCKED_AWAY = 128


def _spec(aux: bool) -> sae.TopK:
    return sae.TopK(latents=256, k=K, aux=1 / 32 if aux else 0.0, aux_k=32, dead_after=DEAD_AFTER)


@paper.claim(
    "TopK reconstructs better than L1 with as many latents, and AuxK makes it better still",
    paper="'TopK activation function' and 'TopK prevents activation shrinkage': a lower error than ReLU with L1 at "
    "every sparsity, and no shrinkage",
    control="the same without AuxK; the L1 autoencoder (2024 form) at about the same L0",
)
def beats_l1_at_equal_sparsity(lab: Lab) -> Verdict:
    """Train TopK with and without AuxK, and L1 at two penalties that end around the same L0."""
    ours = trained(lab, _spec(True).build, "TopK with AuxK", centre=True, clip=1.0)
    without = trained(lab, _spec(False).build, "TopK without AuxK", centre=True, clip=1.0)
    rivals = [
        trained(
            lab,
            sae.Standard(latents=256, penalty=penalty, decoder="weighted").build,
            f"L1, penalty {penalty:g}",
            clip=1.0,
        )
        for penalty in (3.0, 4.0)
    ]
    near = [rival for rival in rivals if ours.quality.l0 <= rival.quality.l0 <= 1.5 * K]
    lab.table(
        "What was trained",
        ["autoencoder", *COLUMNS],
        [
            ["TopK with AuxK", *ours.row],
            ["TopK without AuxK", *without.row],
            *([f"L1, penalty {penalty}", *run.row] for penalty, run in zip((3, 4), rivals, strict=True)),
        ],
    )
    return lab.judge(
        checks={
            "FVU is below that of L1 with at least as many latents on, and at most half as many more": bool(near)
            and all(ours.quality.fvu < rival.quality.fvu for rival in near),
            "mean best cosine above 0.95": ours.recovery.mmcs > 0.95,
            "FVU below 0.20": ours.quality.fvu < 0.20,
            "fewer than 3% dead": ours.quality.dead < 0.03,
            "AuxK does no harm": ours.recovery.mmcs >= without.recovery.mmcs
            and ours.quality.fvu <= without.quality.fvu,
            "nothing shrinks: gamma within 2% of 1": abs(ours.quality.bias - 1) < 0.02,
        },
        measured={
            "L0": ours.quality.l0,
            "FVU": ours.quality.fvu,
            "mean best cosine": ours.recovery.mmcs,
            "directions recovered": ours.recovery.share,
            "dead": ours.quality.dead,
            "gamma": ours.quality.bias,
        },
        control={
            "FVU without AuxK": without.quality.fvu,
            "mean best cosine without AuxK": without.recovery.mmcs,
            "directions recovered without AuxK": without.recovery.share,
            "L0 of L1, penalties 3 and 4": [rival.quality.l0 for rival in rivals],
            "FVU of L1": [rival.quality.fvu for rival in rivals],
            "gamma of L1": [rival.quality.bias for rival in rivals],
        },
        note=SETTING
        + f" Gradients clipped to 1. Mean ||x||^2 of 64; 2,000 steps; k = {K}; how many directions are on varies, so a "
        "fixed k leaves error.",
    )


def _tuck_away(model: sae.SparseAutoencoder) -> None:
    """Make half of the encoder rows so short that their latents are never among the k largest."""
    with torch.no_grad():
        model.encoder[:TUCKED_AWAY] *= 0.02


@paper.claim(
    "AuxK revives latents that are never chosen",
    paper="'Preventing dead latents': without mitigations up to 90% of the latents of a large autoencoder are dead, "
    "with AuxK and the tied start 7% of 16 million",
    control="the same start without the auxiliary loss: what is not chosen gets no gradient and stays dead",
)
def auxk_revives(lab: Lab) -> Verdict:
    """Start with half of the latents too weak to be chosen, and count the dead as training goes."""
    dead: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    every = lab.pick(smoke=2, small=20)

    def counting(kept: list[tuple[int, float]], step: int, model: sae.SparseAutoencoder) -> None:
        if step % every == 0:
            kept.append((step, float((model.idle >= DEAD_AFTER).double().mean())))

    runs: dict[bool, Trained] = {
        aux: trained(
            lab,
            _spec(aux).build,
            "half tucked away, AuxK" if aux else "half tucked away, no AuxK",
            steps=1500,
            centre=True,
            clip=1.0,
            prepare=_tuck_away,
            watch=partial(counting, dead[aux]),
        )
        for aux in (True, False)
    }
    with lab.figure("dead", figsize=(7.2, 3.2)) as figure:
        axes = figure.subplots()
        for aux, color, label in ((False, CONTROL, "without AuxK"), (True, COLORS[0], "with AuxK")):
            axes.plot(*zip(*dead[aux], strict=True), color=color, label=label)
        axes.set_ylim(-0.02, 0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("step (512 inputs each)")
        axes.set_title("Latents not on for the last 20,000 inputs")
        axes.legend(loc="center right")
    ours, control = runs[True], runs[False]
    return lab.judge(
        checks={
            "fewer than 5% are dead at the end": ours.quality.dead < 0.05,
            "without it more than 40% are": control.quality.dead > 0.40,
            "more directions are recovered": ours.recovery.share > control.recovery.share,
            "at a lower error": ours.quality.fvu < control.quality.fvu,
        },
        measured={
            "dead": ours.quality.dead,
            "directions recovered": ours.recovery.share,
            "FVU": ours.quality.fvu,
        },
        control={
            "dead": control.quality.dead,
            "directions recovered": control.recovery.share,
            "FVU": control.quality.fvu,
        },
        note=f"{SETTING} 1,500 steps; the encoder rows of {TUCKED_AWAY} of 256 latents start at 2% of their length.",
    )


def _dense_loss(model: TopKAutoencoder, x: Tensor) -> Tensor:
    """TopK's loss with all latents in memory: the plain way, as the control and the oracle."""
    before = (x - model.decoder_bias) @ model.encoder.T + model.encoder_bias
    values, indices = before.topk(model.spec.k, dim=1)
    latents = torch.zeros_like(before).scatter(1, indices, values.relu())
    return sae.normalized_error(x, latents @ model.trained_decoder() + model.decoder_bias)


def _gradients(model: TopKAutoencoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@paper.claim(
    "Sparsity is what it says: k latents, no gradient elsewhere, and the sparse path computes the dense one",
    paper="'Methods': z = TopK(W_enc (x - b_pre)); AuxK models the residual with dead latents only; the normalized "
    "MSE is 1 for predicting the mean",
    kind="exact",
)
def sparsity_is_exact(lab: Lab) -> Verdict:
    """Compare sparse and dense in float64, and count latents and gradients."""
    torch.manual_seed(lab.seed)
    data = sae.Planted()
    x = data.draw(256, torch.Generator().manual_seed(1)).double()
    model = _spec(True).build(64).double()
    assert isinstance(model, TopKAutoencoder)
    with torch.no_grad():
        model.encoder_bias.normal_(std=0.1)
    loss, _ = model.loss(x, 0.0)
    dense = _dense_loss(model, x)
    pairs = list(zip(_gradients(model, loss), _gradients(model, dense), strict=True))
    apart = max(float((one - two).abs().max()) for one, two in pairs)
    latents = model.encode(x)
    positive = ((x - model.decoder_bias) @ model.encoder.T + model.encoder_bias > 0).sum(dim=1)
    counts = (latents > 0).sum(dim=1)
    whole = sparse.largest(x, model.encoder, model.encoder_bias, 256).dense(256)
    as_relu = float((whole - (x @ model.encoder.T + model.encoder_bias).relu()).detach().abs().max())
    mean_error = float(sae.normalized_error(x, x.mean(dim=0).expand_as(x)))
    dead = torch.arange(256) >= 200
    model.idle[dead] = DEAD_AFTER
    with_aux = _gradients(model, model.loss(x, 0.0)[0])
    model.idle.zero_()
    without_aux = _gradients(model, model.loss(x, 0.0)[0])
    names = [name for name, _ in model.named_parameters()]
    index = names.index("encoder")
    changed = (with_aux[index] != without_aux[index]).any(dim=1)
    return lab.judge(
        checks={
            "loss and gradients equal the dense ones, to 1e-12": apart < 1e-12
            and abs(float(loss.detach() - dense.detach())) < 1e-12,
            "min(k, positive pre-activations) latents are on": bool((counts == positive.clamp_max(K)).all()),
            "with k = m it is a ReLU": as_relu < 1e-12,
            "AuxK changes no living latent's encoder gradient": not bool(changed[~dead].any()),
            "and does change the dead ones'": bool(changed[dead].any()),
            "predicting the mean has an error of 1": abs(mean_error - 1) < 1e-12,
        },
        measured={
            "largest difference of gradients": apart,
            "latents on, most": int(counts.max()),
            "difference from a ReLU at k = m": as_relu,
            "living rows that AuxK changed": int(changed[~dead].sum()),
            "dead rows that AuxK changed": int(changed[dead].sum()),
            "error of the mean": mean_error,
        },
    )


@paper.claim(
    "Decoding k of 16,384 latents costs what k latents cost",
    paper="'Systems' (appendix): kernels for products with sparse latents spare most of a step's arithmetic",
    control="the same loss and gradients with dense latents",
)
def sparse_is_faster(lab: Lab) -> Verdict:
    """Time forward and backward of both at dim 768, 16,384 latents and k = 32, taking turns."""
    latents, batch, rounds = lab.pick(smoke=(512, 32, 1), small=(16_384, BATCH, 5))
    torch.manual_seed(lab.seed)
    model = sae.TopK(latents=latents, k=32, aux=0.0).build(768)
    assert isinstance(model, TopKAutoencoder)
    x = torch.randn(batch, 768)
    seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
    results: dict[str, list[Tensor]] = {}
    with lab.threads(1):
        for _ in lab.track(rounds + 1, "sparse against dense"):
            for name in seconds:
                began = time.perf_counter()
                loss = model.loss(x, 0.0)[0] if name == "sparse" else _dense_loss(model, x)
                results[name] = _gradients(model, loss)
                seconds[name].append(time.perf_counter() - began)
    # The first round of each warms up; the least of the others is what the machine can do.
    best = {name: min(times[1:]) for name, times in seconds.items()}
    apart = max(
        float((one - two).norm() / two.norm()) for one, two in zip(results["sparse"], results["dense"], strict=True)
    )
    return lab.judge(
        checks={
            "the sparse step is more than twice as fast": best["dense"] > 2 * best["sparse"],
            "and the same, to 1e-4": apart < 1e-4,
        },
        measured={
            "milliseconds, forward and backward": 1e3 * best["sparse"],
            "times as fast as dense": best["dense"] / best["sparse"],
            "relative difference of gradients": apart,
        },
        control={"milliseconds, forward and backward": 1e3 * best["dense"]},
        note=f"Batch of {batch}, one thread, float32; the encoder's product, which both share, is dense.",
    )
