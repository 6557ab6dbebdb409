"""RMSNorm: normalize by the root mean square alone; nothing is lost by leaving the mean where it is."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models import Decoder
from paperworks.nn import LayerNorm, Norm, RMSNorm
from paperworks.nn.identity_norm import NoNorm
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, trained

paper = Paper(
    key="rmsnorm",
    title="Root Mean Square Layer Normalization",
    authors="Zhang, Sennrich",
    year=2019,
    ref="arXiv:1910.07467",
    family="blocks",
    summary=(
        "LayerNorm without the subtraction of the mean: the invariance to scale is what helps training, so dividing by "
        "the root mean square, even one estimated from a sixteenth of the units, is as good and cheaper."
    ),
    implements=(
        "paperworks.nn.norm.RMSNorm",
        "paperworks.nn.norm.RootMeanSquareNorm",
        "paperworks.nn.identity_norm.NoNorm",
    ),
    equation=r"y = \frac{x}{\sqrt{\frac{1}{n} \sum_i x_i^2 + \epsilon}} \odot g",
    usage="""
import paperworks as pw
from dataclasses import replace
from paperworks.nn import RMSNorm

spec = pw.preset("llama2-7b")                            # a model is a value: here with pRMSNorm in every place
norm = RMSNorm(fraction=0.0625)
partial = replace(spec, norm=norm, block=replace(spec.block, norm=norm))
print(f"{pw.count_parameters(partial):,} parameters, of which the norms are {(2 * spec.depth + 1) * spec.dim:,}")
""",
)

EXACT = 1e-12  # float64 sums of a few dozen numbers
PARTIAL = 0.0625  # the paper's p of pRMSNorm, Section 6


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@paper.claim(
    "RMSNorm is invariant to the scale of inputs and weights, not to their mean",
    paper="Section 4.1, Table 1; Section 4.2: the gradient of the weight matrix is inversely proportional to its scale",
    kind="exact",
    control="LayerNorm, which is invariant to a shift as well",
)
def invariances(lab: Lab) -> Verdict:
    """Compute each invariance in float64, with eps = 0."""
    dim, scale = 48, 37.0
    rms = RMSNorm(eps=0.0).build(dim).double()
    layer = LayerNorm(eps=0.0).build(dim).double()
    part = RMSNorm(eps=0.0, fraction=PARTIAL).build(dim).double()
    gain = torch.rand(dim, dtype=torch.float64) + 0.5
    with torch.no_grad():
        for module in (rms, layer, part):
            module.weight.copy_(gain)  # type: ignore[operator]
    x = torch.randn(16, dim, dtype=torch.float64)
    weight = torch.randn(dim, dim, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    tail = x.clone()
    tail[:, 3:] *= 5  # ceil(48 * 0.0625) = 3 units are looked at
    head = x[:, :3].norm(dim=-1, keepdim=True)
    measured = {
        "input times 37": _largest(rms(scale * x) - rms(x)),
        "weight matrix times 37": _largest(rms(x @ (scale * weight).T) - rms(x @ weight.T)),
        "input plus 1": _largest(rms(x + 1) - rms(x)),
        "from LayerNorm, mean 0": _largest(rms(centred) - layer(centred)),
        "from LayerNorm, any mean": _largest(rms(x) - layer(x)),
        "gradient of the weights, times their scale": _gradient_at_scale(rms, weight, x, scale),
        "cosine of input and its gradient": _cosine_with_gradient(rms, x),
        "pRMSNorm, input times 37": _largest(part(scale * x) - part(x)),
        "pRMSNorm, first 3 of 48 units only": _largest(part(tail) - tail / (head / 3**0.5) * gain),
    }
    return lab.judge(
        checks={
            "unchanged when the input is scaled": measured["input times 37"] < EXACT,
            "unchanged when the weight matrix is scaled": measured["weight matrix times 37"] < EXACT * scale,
            "changed when the input is shifted": measured["input plus 1"] > 0.1,
            "LayerNorm exactly where the mean is 0": measured["from LayerNorm, mean 0"] < EXACT,
            "and only there": measured["from LayerNorm, any mean"] > 0.1,
            "the weights' gradient is inversely proportional to their scale": (
                measured["gradient of the weights, times their scale"] < EXACT
            ),
            "the input's gradient is orthogonal to it": measured["cosine of input and its gradient"] < EXACT,
            "pRMSNorm is invariant to scale": measured["pRMSNorm, input times 37"] < EXACT * scale,
            "pRMSNorm looks at the first units only": measured["pRMSNorm, first 3 of 48 units only"] < EXACT * scale,
        },
        measured=measured,
        control={
            "LayerNorm, input times 37": _largest(layer(scale * x) - layer(x)),
            "LayerNorm, input plus 1": _largest(layer(x + 1) - layer(x)),
        },
        note="Largest differences; float64, eps = 0, random gains.",
    )


def _gradient_at_scale(norm: nn.Module, weight: Tensor, x: Tensor, scale: float) -> float:
    """Return by how much scale * gradient(scale * weight) differs from gradient(weight)."""
    towards = torch.randn_like(x)

    def gradient(factor: float) -> Tensor:
        scaled = (factor * weight).requires_grad_()
        return torch.autograd.grad((norm(x @ scaled.T) * towards).sum(), scaled)[0]

    one = gradient(1.0)
    return _largest(scale * gradient(scale) - one) / _largest(one)


def _cosine_with_gradient(norm: nn.Module, x: Tensor) -> float:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((norm(x) * torch.randn_like(x)).sum(), x)
    return _largest(torch.cosine_similarity(x, gradient, dim=-1))


@paper.claim(
    "Large half-precision inputs are normalized without overflow",
    paper="Equation 4; the paper says nothing of precision: the root is taken in float32 in every later implementation",
    control="the squares taken in the input's own precision",
)
def half_precision(lab: Lab) -> Verdict:
    """Normalize inputs of magnitude 300 in float16 and bfloat16, and compare with float64."""
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}

    def arm(
        normalized: Callable[[Tensor], Tensor], squared_in: torch.dtype | None
    ) -> Callable[[int], dict[str, float]]:
        def errors(seed: int) -> dict[str, float]:
            wide = torch.randn(32, 256, dtype=torch.float64, generator=lab.generator(seed))
            wide = 300 * wide / wide.square().mean(-1, keepdim=True).sqrt()
            numbers = {}
            for name, dtype in dtypes.items():
                x = wide.to(dtype)
                expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
                with torch.no_grad():
                    found = normalized(x)
                # An output that is not finite is as wrong as one without a correct digit.
                error = ((found.double() - expected) / expected).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
                numbers[f"{name}, error in units of its precision"] = _largest(error) / torch.finfo(dtype).eps
                overflowing = x.to(squared_in or dtype).square().isinf().double().mean()
                numbers[f"{name}, share of squares that overflow"] = float(overflowing)
            return numbers

        return errors

    ours, narrow = "RMSNorm, its root in float32", "squares in the input's precision"
    return lab.compare(
        arms={
            ours: arm(lambda x: RMSNorm().build(x.shape[-1]).to(x.dtype)(x), torch.float32),
            narrow: arm(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True)), None),
        },
        # An error of 1,024 units in float16 is one of 100%.
        main=Beats(ours, narrow, on="float16, error in units of its precision", by=500, lower=True),
        also=[
            # Rounding the normalized value to the nearest costs half a unit; the float32 arithmetic next to nothing.
            AtMost(ours, 1.0, on="float16, error in units of its precision"),
            AtMost(ours, 1.0, on="bfloat16, error in units of its precision"),
            AtLeast(narrow, 0.1, on="float16, share of squares that overflow"),
        ],
        note="Inputs whose root mean square is 300: a square of 90,000 is beyond float16's largest number, 65,504.",
    )


@paper.claim(
    "Both published cast orders are reproduced",
    paper="LLaMA multiplies by the gain after casting back, Gemma by (1 + gain) before; in bfloat16 they differ",
    kind="parity",
)
def cast_orders(lab: Lab) -> Verdict:
    """Compare with both orders written out, on bfloat16 inputs."""
    dim = 256
    x, gain = torch.randn(64, dim).bfloat16(), (torch.randn(dim) * 0.3).bfloat16()
    llama, gemma = RMSNorm().build(dim).bfloat16(), RMSNorm(offset=True).build(dim).bfloat16()
    with torch.no_grad():
        llama.weight.copy_(1 + gain)  # type: ignore[operator]
        gemma.weight.copy_(gain)  # type: ignore[operator]
        normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        after = normal.bfloat16() * llama.weight  # type: ignore[operator]
        before = (normal * (1 + gemma.weight.float())).bfloat16()  # type: ignore[operator]
        wrong = {
            "LLaMA": float((llama(x) != after).double().mean()),
            "Gemma": float((gemma(x) != before).double().mean()),
        }
        mixed = float((llama(x) != before).double().mean())
    return lab.judge(
        # A last bit may turn where torch's kernel adds the squares in another order.
        checks={
            "LLaMA's": wrong["LLaMA"] <= 0.001,
            "Gemma's": wrong["Gemma"] <= 0.001,
            "and they are not the same": mixed > 0.05,
        },
        measured={f"{name}, share of outputs that differ": value for name, value in wrong.items()},
        control={"share that differs when the orders are exchanged": mixed},
    )


def _with_norm(spec: Decoder, norm: Norm) -> Decoder:
    return replace(spec, norm=norm, block=replace(spec.blocks[0], norm=norm))


@paper.claim(
    "RMSNorm and pRMSNorm train a language model as well as LayerNorm",
    paper="Section 6.1, Table 2 (newstest2014): 22.4 BLEU with RMSNorm, 22.6 with pRMSNorm, 22.6 with LayerNorm, 21.7 "
    "without a norm",
    control="no normalization at all, the same learning rate",
)
def trains_as_well(lab: Lab) -> Verdict:
    """Train character models that differ only in the norm."""
    steps, depth = lab.pick(smoke=2, small=120, large=2000), lab.pick(smoke=1, small=4, large=6)
    base = character_llama(depth=depth)
    norms: dict[str, Norm] = {
        "RMSNorm": RMSNorm(),
        "pRMSNorm": RMSNorm(fraction=PARTIAL),
        "LayerNorm": LayerNorm(),
        "no norm": NoNorm(),
    }

    def arm(norm: Norm) -> Callable[[int], dict[str, float]]:
        def loss(seed: int) -> dict[str, float]:
            try:
                model = trained(lab, _with_norm(base, norm), steps, seed, "steps")
            except train.Diverged:  # counts as guessing
                return {"loss": math.log(base.vocab_size)}
            return {"loss": held_out_loss(lab, model)}

        return loss

    verdict = lab.compare(
        arms={name: arm(norm) for name, norm in norms.items()},
        # Twice the margin within which the norms count as equal.
        main=Beats("RMSNorm", "no norm", on="loss", by=0.06, lower=True),
        also=[
            Within("RMSNorm", "LayerNorm", on="loss", by=0.03, lower=True),
            Within("pRMSNorm", "LayerNorm", on="loss", by=0.03, lower=True),
        ],
        seeds=3,
        note=f"{depth} layers, width 64, {steps} steps of 1,024 characters of tinyshakespeare, peak rate {LR}; nats a "
        "character on the last tenth. pRMSNorm looks at 6.25% of the units as in the paper, here 4 of 64, a noisy "
        "estimate (in the paper 32 or more).",
    )
    lab.points("loss", title="Loss of a character model with each norm")
    return verdict


def _plain_layer_norm(x: Tensor, gain: Tensor) -> Float[Tensor, "rows dim"]:
    """LayerNorm without its bias, so that only the re-centring is timed."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * gain


def _plain_rms_norm(x: Tensor, gain: Tensor) -> Float[Tensor, "rows dim"]:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


@paper.claim(
    "Written with the same tensor operations, RMSNorm takes less time than LayerNorm",
    paper="Tables 2 to 9: 7% to 64% less running time than LayerNorm, whole models on their authors' frameworks",
    control="LayerNorm, written with the same operations and without its bias",
)
def takes_less_time(lab: Lab) -> Verdict:
    """Time both in turn on one thread, forward and backward, and torch's own kernels beside them."""
    rows, dim = lab.pick(smoke=64, small=1024), 512
    rounds = lab.pick(smoke=3, small=100)

    @cache
    def medians(seed: int) -> dict[str, float]:
        """Milliseconds of each norm; measured together, so that a busy moment hits all of them alike."""
        draws = random.Random(seed)
        x = torch.randn(rows, dim, generator=lab.generator(seed)).requires_grad_()
        gain = torch.ones(dim, requires_grad=True)
        kernel = nn.LayerNorm(dim)
        parts: dict[str, Callable[[], Tensor]] = {
            "RMSNorm": lambda: _plain_rms_norm(x, gain),
            "LayerNorm": lambda: _plain_layer_norm(x, gain),
            "torch's rms_norm": lambda: nn.functional.rms_norm(x, (dim,), gain, 1e-6),
            "torch's LayerNorm": lambda: kernel(x),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        with lab.threads(1):
            for _ in lab.track(rounds, "rounds"):
                # Shuffled, so that what the part before left in the caches hits all of them alike.
                for name in draws.sample(list(parts), len(parts)):
                    started = time.perf_counter()
                    parts[name]().sum().backward()
                    seconds[name].append(time.perf_counter() - started)
        return {name: 1000 * statistics.median(values) for name, values in seconds.items()}

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"milliseconds": medians(seed)[name]}

    names = ("RMSNorm", "LayerNorm", "torch's rms_norm", "torch's LayerNorm")
    verdict = lab.compare(
        arms={name: arm(name) for name in names},
        main=Beats("RMSNorm", "LayerNorm", on="milliseconds", by_ratio=0.07, lower=True),  # the least of Tables 2 to 9
        also=[Beats("torch's rms_norm", "torch's LayerNorm", on="milliseconds", lower=True)],
        note=f"Medians of {rounds} rounds, {rows} rows of {dim}, forward and backward, one thread. torch "
        "fuses LayerNorm into one kernel on a CPU and composes rms_norm from several, which costs more than it saves.",
    )
    lab.points("milliseconds", title="Time of a norm, forward and backward")
    return verdict
