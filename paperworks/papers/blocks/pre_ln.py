"""Where the layer norm stands: on the residual stream it needs warm-up, inside the branch it does not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks import train
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, Encoder, EncoderModel, PostNorm, PreNorm
from paperworks.nn import MLP, Attention, LayerNorm, Placement, SinusoidalPositions
from paperworks.testbeds.characters import BATCH, LENGTH, held_out_loss, play
from paperworks.testbeds.training import fit

paper = Paper(
    key="pre-ln",
    title="On Layer Normalization in the Transformer Architecture",
    authors="Xiong, Yang, He, Zheng, Zheng, Xing, Zhang, Lan, Wang, Liu",
    year=2020,
    ref="arXiv:2002.04745",
    family="blocks",
    summary=(
        "With the norm after each addition the last layers' gradients are large at the start, however deep the model "
        "is, so the rate must warm up; with the norm inside the branch they shrink with depth and it need not."
    ),
    implements=("paperworks.models.block.Block",),
    equation=(
        r"\text{Post-LN: } x \leftarrow \operatorname{LN}(x + F(x)), \qquad \text{Pre-LN: } x \leftarrow x + "
        r"F(\operatorname{LN}(x))"
    ),
    usage="""
import torch
from paperworks.models import Block, Decoder, PostNorm, PreNorm
from paperworks.nn import MLP, Attention, LayerNorm

for arrangement in (PreNorm(), PostNorm()):  # one field of a block
    block = Block(norm=LayerNorm(), mixer=Attention(heads=4), feedforward=MLP(hidden=128), arrangement=arrangement)
    final = LayerNorm() if isinstance(arrangement, PreNorm) else None
    model = Decoder(vocab_size=100, dim=32, depth=12, block=block, norm=final).build()
    model(torch.randint(100, (2, 16))).logsumexp(-1).mean().backward()
    norms = [float(each.feedforward.down.weight.grad.norm()) for each in model.blocks]
    print(type(arrangement).__name__, "gradient of the first and last layer:", norms[0], norms[-1])
""",
)

Arrangement = Literal["post", "pre"]
KINDS: tuple[Arrangement, ...] = ("post", "pre")
DEPTHS = (2, 4, 8, 16, 32)
DIM, TIME, CLASSES = 64, 16, 64


def xavier(model: nn.Module) -> None:
    """Draw every linear layer as Glorot and Bengio do, biases zero: the initialization of the paper's theorems."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def silence(block: nn.Module, *names: str) -> None:
    """Set the weights of these maps to zero."""
    for name in names:
        nn.init.zeros_(block.get_parameter(f"{name}.weight"))


class _Classified(nn.Module):
    """The network of Section 3.3: an encoder and one softmax at each token."""

    def __init__(self, arrangement: Arrangement, depth: int) -> None:
        super().__init__()
        block = Block(
            norm=LayerNorm(),
            mixer=Attention(heads=1, causal=False),
            feedforward=MLP(hidden=DIM, activation="relu"),
            arrangement=PreNorm() if arrangement == "pre" else PostNorm(),
        )
        spec = Encoder(
            vocab_size=CLASSES,
            dim=DIM,
            depth=depth,
            block=block,
            norm=LayerNorm() if arrangement == "pre" else None,
            embedding_std=1.0,
        )
        self.encoder: EncoderModel = spec.build()
        self.classes = nn.Linear(DIM, CLASSES, bias=False)
        xavier(self)
        for each in self.encoder.blocks:
            silence(each, "mixer.query", "mixer.key")  # attention is uniform

    def down(self, layer: int) -> Tensor:
        """Return W2 of a layer's feed-forward part."""
        return self.encoder.blocks[layer].get_parameter("feedforward.down.weight")

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, classes)."""
        return self.classes(self.encoder(tokens))


def _gradients(arrangement: Arrangement, depth: int, draws: int, seed: int) -> list[float]:
    """Return the norm of the gradient of each layer's W2 at the start, the mean over models, rows and labels."""
    sums = [0.0] * depth
    for draw in range(draws):
        torch.manual_seed(1000 * seed + draw)
        model = _Classified(arrangement, depth)
        tokens, labels = torch.randint(CLASSES, (2, 4, TIME))
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
        for layer in range(depth):
            gradient = model.down(layer).grad
            assert gradient is not None
            sums[layer] += float(gradient.norm()) / draws
    return sums


@torch.no_grad()
def _sizes(arrangement: Arrangement, depth: int, draws: int, seed: int) -> list[float]:
    """Return mean ||x||^2 / d after each layer: of the post-norm stream before its norm, of the pre-norm stream."""
    sizes = torch.zeros(depth)
    for draw in range(draws):
        torch.manual_seed(1000 * seed + draw)
        model = _Classified(arrangement, depth)
        seen: list[Tensor] = []
        hooks = []
        for block in model.encoder.blocks:
            if arrangement == "post":
                norm = block.get_submodule("feedforward_norm")
                hooks.append(norm.register_forward_pre_hook(lambda _, given, to=seen: to.append(given[0])))
            else:
                hooks.append(block.register_forward_hook(lambda _, __, out, to=seen: to.append(out)))
        model(torch.randint(CLASSES, (4, TIME)))
        for hook in hooks:
            hook.remove()
        sizes += torch.stack([x.square().sum(-1).mean() / DIM for x in seen]) / draws
    return sizes.tolist()


def _slope(values: dict[int, float]) -> float:
    """Return the slope of log value against log depth, by least squares."""
    x, y = [math.log(depth) for depth in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(x, y).slope


@paper.claim(
    "At the start the last layer's gradient falls with depth for pre-norm and not for post-norm",
    paper="Theorem 1: O(d sqrt(ln d)) for Post-LN, O(d sqrt(ln d / L)) for Pre-LN; Lemma 2: E||x||^2 = 3d/2 before the "
    "norm, and between (1 + l/2)d and (1 + 3l/2)d",
    kind="exact",
    control="post-norm, the arrangement of the original transformer",
)
def gradients_at_the_start(lab: Lab) -> Verdict:
    """Average gradients over models with uniform attention and Xavier weights; fit a power of the depth."""
    draws, depths = lab.pick(smoke=1, small=20), lab.pick(smoke=DEPTHS[:2], small=DEPTHS)
    gradients: dict[Arrangement, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    with lab.threads(1), lab.progress("gradients at the start", 2 * len(depths)) as advance:
        for arrangement, found in gradients.items():
            for depth in depths:
                found[depth] = _gradients(arrangement, depth, draws, lab.seed)
                advance(1)
        # tokens under uniform attention become alike, so a model counts as little more than one vector: many are needed
        sizes = {kind: _sizes(kind, 16, 10 * draws, lab.seed) for kind in KINDS}
    last = {kind: {depth: norms[-1] for depth, norms in found.items()} for kind, found in gradients.items()}
    slopes = {kind: _slope(values) for kind, values in last.items()}
    ratios = {kind: found[depths[-1]][0] / found[depths[-1]][-1] for kind, found in gradients.items()}
    _draw_gradients(lab, last, gradients)
    within = all(1 + layer / 2 <= size <= 1 + 3 * layer / 2 for layer, size in enumerate(sizes["pre"], start=1))
    return lab.judge(
        checks={
            "pre-norm: slope at most -0.3": slopes["pre"] <= -0.3,
            "post-norm: slope at least 0": slopes["post"] >= 0,
            "post-norm: ||x||^2 within 5% of 3d/2 before norms": all(abs(s / 1.5 - 1) < 0.05 for s in sizes["post"]),
            "pre-norm: ||x||^2 within its bounds after every layer": within,
            "without branches pre-norm is the identity and post-norm the norm": _without_branches(),
        },
        measured={
            "slope of log gradient against log depth": slopes["pre"],
            "gradient of the last layer, by depth": list(last["pre"].values()),
            "||x||^2 / d after 16 layers": sizes["pre"][-1],
            f"first layer / last layer, depth {depths[-1]}": ratios["pre"],
        },
        control={
            "slope of log gradient against log depth": slopes["post"],
            "gradient of the last layer, by depth": list(last["post"].values()),
            "||x||^2 / d before a norm, least and most": [min(sizes["post"]), max(sizes["post"])],
            f"first layer / last layer, depth {depths[-1]}": ratios["post"],
        },
        note=f"Width {DIM}, {TIME} tokens, one head, {draws} models; depths {', '.join(map(str, depths))}. "
        "The theorem's power is -0.5 for depths so large that the embedding counts no more.",
    )


@torch.no_grad()
def _without_branches() -> bool:
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    outs = {}
    for kind in KINDS:
        block = _Classified(kind, 1).double().encoder.blocks[0]
        silence(block, "mixer.output", "feedforward.down")
        outs[kind] = block(x, Placement().resolve(2, TIME, x.device))
    normal = F.layer_norm(x, (DIM,))
    # twice through the norm: its epsilon of 1e-5 shrinks a normal vector by 5e-6
    return torch.equal(outs["pre"], x) and float((outs["post"] - normal).abs().max()) < 1e-4


def _draw_gradients(
    lab: Lab, last: dict[Arrangement, dict[int, float]], gradients: dict[Arrangement, dict[int, list[float]]]
) -> None:
    with lab.figure("gradients", figsize=(8.4, 3.2)) as figure:
        by_depth, by_layer = figure.subplots(1, 2)
        for kind, color in zip(KINDS, (CONTROL, COLORS[0]), strict=True):
            values = last[kind]
            by_depth.plot(list(values), list(values.values()), marker="o", color=color, label=f"{kind}-norm")
            deepest = gradients[kind][max(values)]
            by_layer.plot(range(1, len(deepest) + 1), deepest, color=color, label=f"{kind}-norm")
        by_depth.set_xscale("log", base=2)
        by_depth.set_yscale("log")
        by_layer.set_yscale("log")
        by_depth.set_xticks(list(values), map(str, values))
        for axes in (by_depth, by_layer):
            axes.set_yticks((0.1, 0.2, 0.4, 0.8), ("0.1", "0.2", "0.4", "0.8"))
            axes.minorticks_off()
        by_depth.set_xlabel("layers")
        by_depth.set_title("Gradient of the last layer's W2")
        by_layer.set_xlabel(f"layer, of {len(deepest)}")
        by_layer.set_title("Gradient of each layer's W2")
        by_layer.legend()


LAYERS, RATE, WARMUP = 12, 1e-3, 120


def _model(lab: Lab, arrangement: Arrangement) -> Decoder:
    block = Block(
        norm=LayerNorm(),
        mixer=Attention(heads=4, bias=True),
        feedforward=MLP(hidden=256, activation="relu"),
        arrangement=PreNorm() if arrangement == "pre" else PostNorm(),
    )
    spec = Decoder(
        vocab_size=play().tokenizer.vocab_size,
        dim=DIM,
        depth=lab.pick(smoke=2, small=LAYERS),
        block=block,
        norm=None,
        position=SinusoidalPositions(),
        embedding_std=1.0,
    )
    return replace(spec, norm=LayerNorm()) if arrangement == "pre" else spec


@paper.claim(
    "Without warm-up pre-norm learns and post-norm does not; with warm-up post-norm does too",
    paper="Figures 2 and 5: on IWSLT14 De-En Post-LN without warm-up reaches 8.45 BLEU at a rate of 1e-3; Pre-LN "
    "without warm-up is as good as Post-LN with it",
    control="post-norm without warm-up, and with it",
    reach="real",
)
def needs_no_warmup(lab: Lab) -> Verdict:
    """Train twelve layers on characters with a constant rate."""
    play()  # before the bars: it may have to be fetched
    steps = lab.pick(smoke=2, small=360)
    rows = BATCH // 2

    def arm(arrangement: Arrangement, warmup: int) -> Callable[[int], dict[str, float | list[float]]]:
        def measures(seed: int) -> dict[str, float | list[float]]:
            model = _model(lab, arrangement).build()
            xavier(model)
            batches = play().train_windows(length=LENGTH, batch=rows, count=steps, seed=seed)
            with lab.threads(1):
                losses = fit(
                    model, train.next_token_loss, batches, steps=steps, lr=RATE, seed=seed, schedule="constant",
                    warmup=min(warmup, steps), optimizer=train.AdamW(weight_decay=0.0), clip=None,
                )  # fmt: skip
            return {"held-out loss": held_out_loss(lab, model.eval()), "training loss": losses}

        return measures

    verdict = lab.compare(
        arms={
            "pre-norm": arm("pre", 0),
            "post-norm": arm("post", 0),
            "post-norm, warm-up": arm("post", WARMUP),
        },
        main=Beats("pre-norm", "post-norm", on="held-out loss", by=0.65, lower=True),
        also=[
            Beats("post-norm, warm-up", "post-norm", on="held-out loss", by=0.5, lower=True),
            Within("pre-norm", "post-norm, warm-up", on="held-out loss", by=0.05, lower=True),
        ],
        seeds=2,
        note=f"{LAYERS} layers of width {DIM}, four heads, ReLU, {LENGTH} characters of tinyshakespeare, batches of "
        f"{rows}, {steps} steps, {WARMUP} of warm-up where there is any, Xavier weights, Adam at {RATE:g} without "
        f"decay "
        "or clipping; nats a character on the last tenth; single letters: 3.3.",
    )
    lab.curves("training loss", name="training", title=f"{LAYERS} layers, Adam at a constant {RATE:g}")
    return verdict
