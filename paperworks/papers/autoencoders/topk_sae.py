"""TopK autoencoders: sparsity by construction, and an auxiliary loss that keeps latents alive."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from paperworks.interpret import sae
from paperworks.interpret.sae.kinds import sparse
from paperworks.interpret.sae.kinds.topk import TopKAutoencoder
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.testbeds.planted_features import BATCH, SETTING, Trained, trained

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
    equation=r"z = \operatorname{TopK}(W_\mathrm{enc}(x - b_\mathrm{pre}) + b_\mathrm{enc}), \qquad "
    r"\mathcal{L} = \lVert x - \hat x \rVert^2 + \tfrac{1}{32} \lVert (x - \hat x) - W_\mathrm{dec} z_\mathrm{dead} "
    r"\rVert^2",
    usage="""
import torch
from paperworks import train
from paperworks.interpret import sae

data = sae.Planted(mean_square=64.0)  # activations whose directions are known; 64 dimensions
model = sae.TopK(latents=256, k=5, aux=1 / 32, aux_k=32, dead_after=20_000).build(64)
model.centre(data.draw(8192, torch.Generator().manual_seed(1)))  # b_pre at the geometric median
training = sae.Training(model, steps=300)
settings = train.Settings(steps=300, lr=2e-3, progress=False, save_every=None)
train.fit(model, training.loss, lambda epoch: data.batches(512, 300, seed=0), settings, on_step=training.after_step)
print(sae.recovery(data.directions, model))
""",
    notes=(
        "Planted directions and 256 latents, where the paper has GPT-4's activations and 16 million. How many "
        "directions are on varies here, so a fixed k leaves error. No moving average of the weights."
    ),
)

K = 5  # as many directions as are on at a time, on average
DEAD_AFTER = 20_000
TUCKED_AWAY = 128


def _spec(aux: bool) -> sae.TopK:
    return sae.TopK(latents=256, k=K, aux=1 / 32 if aux else 0.0, aux_k=32, dead_after=DEAD_AFTER)


def _numbers(done: Trained) -> dict[str, float]:
    return {
        "FVU": done.quality.fvu,
        "L0": done.quality.l0,
        "gamma": done.quality.bias,
        "mean best cosine": done.recovery.mmcs,
        "directions recovered": done.recovery.share,
        "dead": done.quality.dead,
    }


@paper.claim(
    "TopK reconstructs better than L1 with fewer latents on, and does not shrink",
    paper="'TopK activation function' and 'TopK prevents activation shrinkage': a lower error than ReLU with L1 at "
    "every sparsity, and no shrinkage",
    control="the L1 autoencoder (2024 form) with at least as many latents on; the same without AuxK",
)
def beats_l1_with_fewer_latents(lab: Lab) -> Verdict:
    """Train TopK with and without AuxK, and L1 at the penalty that ends at a little more than k latents."""

    def arm(name: str, spec: sae.SparseAutoencoderSpec, centre: bool) -> Callable[[int], dict[str, float]]:
        return lambda seed: _numbers(trained(lab, spec.build, name, steps=1500, centre=centre, clip=1.0, seed=seed))

    ours, without, plain = "TopK with AuxK", "TopK without AuxK", "L1, penalty 3"
    verdict = lab.compare(
        arms={
            ours: arm(ours, _spec(True), True),
            without: arm(without, _spec(False), True),
            plain: arm(plain, sae.Standard(latents=256, penalty=3.0, decoder="weighted"), False),
        },
        main=Beats(ours, plain, on="FVU", by_ratio=0.25, lower=True),
        also=[
            Beats(ours, plain, on="L0", lower=True),
            AtMost(plain, 1.5 * K, on="L0"),  # else the comparison would be of two sparsities
            Within(ours, without, on="FVU", by=0.005, lower=True),
            AtLeast(ours, 0.98, on="gamma"),
            AtMost(ours, 1.02, on="gamma"),
            AtLeast(ours, 0.95, on="mean best cosine"),
        ],
        seeds=3,
        note=SETTING + f" Gradients clipped to 1. Mean ||x||^2 of 64; 1,500 steps; k = {K}.",
    )
    lab.points("FVU", name="error", title="Variance unexplained")
    return verdict


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
    every = lab.pick(smoke=2, small=20)

    def arm(name: str, aux: bool) -> Callable[[int], dict[str, float | list[float]]]:
        def run(seed: int) -> dict[str, float | list[float]]:
            looks: list[float] = []
            dead: list[float] = []

            def watch(step: int, model: sae.SparseAutoencoder) -> None:
                if step % every == 0:
                    looks.append(step)
                    dead.append(100 * float((model.idle >= DEAD_AFTER).double().mean()))

            build = _spec(aux).build
            done = trained(
                lab, build, name, steps=1000, centre=True, clip=1.0, prepare=_tuck_away, watch=watch, seed=seed
            )
            return _numbers(done) | {"step": looks, "latents long off, percent": dead}

        return run

    ours, control = "with AuxK", "without AuxK"
    verdict = lab.compare(
        arms={ours: arm(ours, True), control: arm(control, False)},
        main=Beats(ours, control, on="dead", by=0.4, lower=True),
        also=[
            AtMost(ours, 0.05, on="dead"),
            Beats(ours, control, on="directions recovered", by=0.2),
            Beats(ours, control, on="FVU", lower=True),
        ],
        seeds=3,
        note=f"{SETTING} 1,000 steps; the encoder rows of {TUCKED_AWAY} of 256 latents start at 2% of their length. "
        f"Long off: not on for the last {DEAD_AFTER:,} inputs.",
    )
    lab.curves("latents long off, percent", x="step", name="dead")
    return verdict


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
    names = ("sparse", "dense")

    @cache
    def steps(seed: int) -> tuple[dict[str, float], float]:
        """Milliseconds of a step of each, the least of the rounds, and the relative difference of their gradients."""
        torch.manual_seed(seed)
        model = sae.TopK(latents=latents, k=32, aux=0.0).build(768)
        assert isinstance(model, TopKAutoencoder)
        x = torch.randn(batch, 768)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        results: dict[str, list[Tensor]] = {}
        with lab.threads(1):
            for _ in range(rounds + 1):
                for name in names:
                    began = time.perf_counter()
                    loss = model.loss(x, 0.0)[0] if name == "sparse" else _dense_loss(model, x)
                    results[name] = _gradients(model, loss)
                    seconds[name].append(time.perf_counter() - began)
        pairs = zip(results["sparse"], results["dense"], strict=True)
        # The first round of each warms up; the least of the others is what the machine can do.
        return (
            {name: 1e3 * min(times[1:]) for name, times in seconds.items()},
            max(float((one - two).norm() / two.norm()) for one, two in pairs),
        )

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"milliseconds": steps(seed)[0][name], "difference of gradients": steps(seed)[1]}

    verdict = lab.compare(
        arms={name: arm(name) for name in names},
        main=Beats("sparse", "dense", on="milliseconds", by_ratio=0.5, lower=True),
        also=[AtMost("sparse", 1e-4, on="difference of gradients")],
        seeds=3,
        note=f"Batch of {batch}, one thread, float32; the encoder's product, which both share, is dense.",
    )
    lab.points("milliseconds", name="speed", title="Time of a step, forward and backward, milliseconds")
    return verdict
