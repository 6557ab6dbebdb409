"""RoPE: queries and keys are rotated by their positions, so that scores depend on distances only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import api, train
from paperworks.data.text.windows import Batch
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Decoder, DecoderModel
from paperworks.nn import (
    AbsolutePositions,
    Attention,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Placement,
    RoPE,
    YaRNScaling,
)
from paperworks.nn.position.rotary import RoPEScaling
from paperworks.testbeds.characters import LENGTH, character_llama, held_out_loss, learned_positions, play, trained

paper = Paper(
    key="rope",
    title="RoFormer: Enhanced Transformer with Rotary Position Embedding",
    authors="Su, Lu, Pan, Murtadha, Wen, Liu",
    year=2021,
    ref="arXiv:2104.09864",
    family="attention",
    summary=(
        "Each pair of query and key channels is rotated by an angle proportional to the position, so their product "
        "depends on the distance only; the angles can be rescaled to reach beyond the trained length."
    ),
    implements=(
        "paperworks.nn.position.rotary.RoPE",
        "paperworks.nn.position.rotary.LinearScaling",
        "paperworks.nn.position.rotary.NTKScaling",
        "paperworks.nn.position.rotary.DynamicNTKScaling",
        "paperworks.nn.position.rotary.YaRNScaling",
    ),
    equation=r"\langle R_m q, R_n k \rangle = \langle R_{m-n} q, k \rangle, \quad \theta_i = b^{-2i/d}",
    usage="""
import torch
import paperworks as pw
from paperworks.nn import Attention, NTKScaling, Placement, RoPE, YaRNScaling

model = pw.load("smollm2")
tokens = torch.tensor([model.tokenizer.encode("Only distances count.")])
later = Placement(positions=torch.arange(tokens.shape[1])[None] + 1000)
print("change 1,000 positions on:", float((model(tokens, later) - model(tokens)).detach().abs().max()))
for scaling in (NTKScaling(factor=4.0), YaRNScaling(factor=4.0, trained_length=64)):
    print(Attention(heads=4, position=RoPE(base=1e6, scaling=scaling)).build(64))
""",
)

FARTHEST = 1024
# The part takes angles in float32: an angle of 1,024 radians is known to 6e-5, and the vectors here have length 1.
ROUNDING = 2e-4


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _rotated(rope: RoPE, x: Float[Tensor, "rows dim"], positions: Tensor) -> Float[Tensor, "rows dim"]:
    """Rotate each row by its position, with the part that attention uses."""
    cos, sin = rope.table(positions[None], x.shape[-1], 0, x.dtype)
    return rope.rotate(x[None, None], cos, sin)[0, 0]


def _as_complex(rope: RoPE, x: Tensor, positions: Tensor) -> Tensor:
    """Equation 34 as complex numbers, in float64: (x_2i + j x_2i+1) * exp(j m theta_i), adjacent channels paired."""
    theta = rope.base ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angles = positions.double()[:, None] * theta
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


@paper.claim(
    "Rotated products depend on the distance only, and rotations compose",
    paper="Equations 1, 14 to 16 and 34; Section 3.4.3: the norm is kept",
    kind="exact",
    control="keys rotated the other way, whose products depend on the sum of the positions",
)
def rotations_are_exact(lab: Lab) -> Verdict:
    """Check relative position, norm, identity, composition, the complex form and the two layouts."""
    rows, dim = lab.pick(smoke=64, small=2048), 64
    rope, half = RoPE(layout="interleaved"), RoPE(layout="half")
    q, k = (torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1) for _ in range(2))
    m, n, shift = (torch.randint(FARTHEST // 2, (rows,)) for _ in range(3))

    def score(at_q: Tensor, at_k: Tensor) -> Tensor:
        return (_rotated(rope, q, at_q) * _rotated(rope, k, at_k)).sum(-1)

    permuted = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))  # adjacent pairs to two halves
    measured = {
        "product, both positions shifted": _largest(score(m + shift, n + shift) - score(m, n)),
        "norm": _largest(_rotated(rope, q, m).norm(dim=-1) - 1),
        "position 0": _largest(_rotated(rope, q, 0 * m) - q),
        "by m, then by n, against by m + n": _largest(
            _rotated(rope, _rotated(rope, q, m), n) - _rotated(rope, q, m + n)
        ),
        "complex multiplication": _largest(_rotated(rope, q, m) - _as_complex(rope, q, m)),
        "half-split, channels permuted": _largest(
            _rotated(half, q[:, permuted], m) - _rotated(rope, q, m)[:, permuted]
        ),
    }
    control = {
        "product, both positions shifted, keys rotated backwards": _largest(
            (_rotated(rope, q, m + shift) * _rotated(rope, k, -n - shift)).sum(-1)
            - (_rotated(rope, q, m) * _rotated(rope, k, -n)).sum(-1)
        ),
        "half-split, channels as they are": _largest(_rotated(half, q, m) - _rotated(rope, q, m)),
    }
    return lab.judge(
        checks={
            **{name: value <= (1e-6 if name in _FREE else ROUNDING) for name, value in measured.items()},
            "backwards keys fail": control["product, both positions shifted, keys rotated backwards"] > 0.1,
            "layouts differ without the permutation": control["half-split, channels as they are"] > 0.1,
        },
        measured=measured,
        control=control,
        note=f"Largest differences over {rows} pairs of random unit vectors of {dim} channels, positions below "
        f"{FARTHEST}; angles are float32, as in the models.",
    )


_FREE = ("norm", "position 0")  # these hold whatever the angle is, so its rounding does not count


def _bound(dim: int, distances: int) -> Float[Tensor, " distances"]:
    """Return sum_i |S_i| / (dim / 2), S_i the partial sums of exp(j * distance * theta), for each distance from 0."""
    theta = RoPE().frequencies(dim).double()
    angles = torch.arange(distances, dtype=torch.float64)[:, None] * theta
    return torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs().mean(-1)


@paper.claim(
    "The bound of a product decays with the distance",
    paper="Section 3.4.3, Equation 37 and Figure 2",
    kind="exact",
    control="one frequency for all channels, which does not decay",
)
def bound_decays(lab: Lab) -> Verdict:
    """Compute the bound by partial sums, hold random products against it, and look at its decay."""
    dim, distances = 128, 256
    bound = _bound(dim, distances)
    q, k = torch.randn(2, 512, dim, dtype=torch.float64).unbind(0)
    pair_q, pair_k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    h = pair_q * pair_k.conj()
    steps = torch.diff(h, dim=-1, append=torch.zeros(len(h), 1, dtype=h.dtype)).abs().amax(-1)  # h_{d/2} = 0
    at = torch.arange(distances)
    rope = RoPE(layout="interleaved")
    share = 0.0
    for distance in range(0, distances, 5):
        here = at.new_full((len(q),), distance)
        product = (_rotated(rope, q, here) * k).sum(-1).abs()
        share = max(share, float((product / (steps * bound[distance] * (dim // 2))).max()))
    near, middle, far = (float(bound[low:high].mean()) for low, high in ((0, 16), (16, 64), (64, 256)))
    flat = dim / 4 + 0.5  # |exp(j a)| partial sums 1, 2 ... d/2, whatever the distance
    with lab.figure("bound", figsize=(7.2, 3.2)) as figure:
        axes = figure.subplots()
        axes.plot(at, bound, color=COLORS[0], label="theta = 10000^(-2i/d)")
        axes.axhline(flat, color=CONTROL, label="one theta for all channels (control)")
        axes.set_ylim(0, None)
        axes.set_xlabel("distance of two tokens")
        axes.set_title("Upper bound of the product of a rotated query and key (relative)")
        axes.legend()
    return lab.judge(
        checks={
            "it falls from near to middle to far": near > middle > far,
            "by half from the first 16 positions to those beyond 64": far <= near / 2,
            "no product exceeds it": share <= 1,
        },
        measured={
            "mean below 16": near,
            "mean from 16 to 63": middle,
            "mean from 64 to 255": far,
            "largest share of the bound that a random product reaches": share,
        },
        control={"with one frequency, at every distance": flat},
        note="Width 128 as in Figure 2. It is a bound of all vectors, not a property of trained ones.",
    )


@paper.claim(
    "Each scaling rule gives its published frequencies",
    paper="Not in this paper: position interpolation (2306.15595), NTK-aware and dynamic, YaRN (2309.00071), Llama 3.1",
    kind="exact",
)
def scalings_are_exact(lab: Lab) -> Verdict:
    """Compute each rule in float64, channel by channel, and compare with the parts."""
    dim, base, factor, trained_length, time = 64, 10_000.0, 4.0, 2048, 6000
    rope = RoPE(base=base)
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]

    def enlarged(by: float) -> list[float]:
        return [(base * by ** (dim / (dim - 2))) ** (-2 * i / dim) for i in range(dim // 2)]

    def turning(turns: float) -> float:  # the channel that turns so often over the trained length
        return dim * math.log(trained_length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), dim - 1)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
    smooth = [min(max((trained_length * f / (2 * math.pi) - 1) / (4 - 1), 0.0), 1.0) for f in plain]
    rules = {
        "linear": (LinearScaling(factor=factor), [f / factor for f in plain]),
        "NTK": (NTKScaling(factor=factor), enlarged(factor)),
        "dynamic NTK": (
            DynamicNTKScaling(factor=factor, trained_length=trained_length),
            enlarged(factor * time / trained_length - (factor - 1)),
        ),
        "YaRN": (
            YaRNScaling(factor=factor, trained_length=trained_length),
            [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)],
        ),
        "Llama 3.1": (
            Llama3Scaling(factor=factor, trained_length=trained_length),
            [(1 - s) * f / factor + s * f for f, s in zip(plain, smooth, strict=True)],
        ),
    }
    measured = {
        name: _largest(scaling.frequencies(rope, dim, time).double() / torch.tensor(expected).double() - 1)
        for name, (scaling, expected) in rules.items()
    }
    amplitude = YaRNScaling(factor=factor, trained_length=trained_length).amplitude()
    return lab.judge(
        # float32 powers; some cancel against each other in the ramps
        checks={
            **{name: value <= 1e-5 for name, value in measured.items()},
            "YaRN's cosines are times 0.1 ln(s) + 1": abs(amplitude - (0.1 * math.log(factor) + 1)) < 1e-12,
        },
        measured={f"{name}, largest relative difference": value for name, value in measured.items()},
    )


@paper.claim(
    "SmolLM2 gives the same logits wherever its text stands",
    paper="Equation 16: only relative positions enter the scores",
    kind="exact",
    control="only the second half of the tokens moved by 1000, which changes distances",
)
@torch.no_grad()
def positions_may_be_shifted(lab: Lab) -> Verdict:
    """Run SmolLM2 with all positions, and with some, moved by 1000."""
    model = api.load("smollm2", device=lab.device)
    text = "To be rotated by its position, a vector must be cut into pairs; " * 3
    tokens = torch.tensor([model.tokenizer.encode(text, bos=False)[: lab.pick(smoke=8, small=40)]], device=lab.device)
    positions = torch.arange(tokens.shape[1], device=lab.device)[None]
    half = 1000 * (positions >= tokens.shape[1] // 2)
    logits = model(tokens)
    shifted = _largest(model(tokens, Placement(positions=positions + 1000)) - logits)
    torn = _largest(model(tokens, Placement(positions=positions + half)) - logits)
    return lab.judge(
        checks={"all moved: logits change by less than 0.01": shifted < 1e-2, "half moved: by more than 1": torn > 1},
        measured={"largest change, all moved": shifted, "largest logit": _largest(logits)},
        control={"largest change, second half moved": torn},
        note=f"{tokens.shape[1]} tokens, float32. The rest is rounding: an angle near 1,000 is known to 3e-5.",
    )


def _steps(scale: str) -> int:
    return {"smoke": 2, "small": 450, "large": 6000}[scale]


def _model(lab: Lab, position: RoPE | None) -> Decoder:
    play()  # before the bars: it may have to be fetched
    return _with_rope(character_llama(depth=lab.pick(smoke=1, small=2)), position)


def _with_rope(spec: Decoder, position: RoPE | None) -> Decoder:
    block = spec.blocks[0]
    assert isinstance(block.mixer, Attention)
    return replace(spec, block=replace(block, mixer=replace(block.mixer, position=position)))


_TRAINED: dict[tuple[str, int], DecoderModel] = {}  # two claims look at the same models


def _rotary(lab: Lab, seed: int) -> DecoderModel:
    if (lab.scale, seed) not in _TRAINED:
        _TRAINED[lab.scale, seed] = trained(lab, _model(lab, RoPE()), _steps(lab.scale), seed, "RoPE")
    return _TRAINED[lab.scale, seed]


@paper.claim(
    "Rotary positions are at least as good as learned ones",
    paper="Sections 4.1 to 4.3: 27.5 against 27.3 BLEU, and a faster decrease of the pre-training loss than BERT",
    control="no positions at all (the causal mask still tells some), and learned absolute positions",
    reach="real",
)
def beats_learned_positions(lab: Lab) -> Verdict:
    """Train character models that differ only in their positions; decode with a cache and compare."""

    def arm(make: Callable[[int], DecoderModel]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = make(seed)
            return {"loss": held_out_loss(lab, model), "difference of cached logits": _cached_difference(model)}

        return measures

    def other(position: AbsolutePositions | None) -> Callable[[int], DecoderModel]:
        spec = replace(_model(lab, None), position=position)
        return lambda seed: trained(lab, spec, _steps(lab.scale), seed, "other positions")

    verdict = lab.compare(
        arms={
            "RoPE": arm(lambda seed: _rotary(lab, seed)),
            "learned positions": arm(other(learned_positions())),
            "no positions": arm(other(None)),
        },
        main=Beats("RoPE", "no positions", on="loss", by=0.05, lower=True),
        also=[
            Beats("RoPE", "learned positions", on="loss", lower=True),
            AtMost("RoPE", 1e-4, on="difference of cached logits"),
        ],
        seeds=3,
        note=f"Two layers of width 64, {_steps(lab.scale)} steps of 1,024 characters of tinyshakespeare; nats a "
        "character on the last tenth.",
    )
    lab.points("loss", name="positions", title="Held-out loss by positions")
    return verdict


@torch.no_grad()
def _cached_difference(model: DecoderModel) -> float:
    tokens = play().validation[None, :LENGTH]
    whole = model(tokens)
    cache = model.new_cache(1, LENGTH)
    parts = [model(tokens[:, at : at + 1], Placement(cache=cache)) for at in range(LENGTH)]
    return _largest(torch.cat(parts, 1) - whole)


@paper.claim(
    "Beyond the trained length RoPE degrades, and rescaled angles recover at least half",
    paper="Not in this paper, which trains at 512 and tests to 1,024 (Table 5); scalings: 2306.15595, bloc97 2023",
    control="plain RoPE at twice the trained length",
    reach="real",
)
def scaling_extends_the_context(lab: Lab) -> Verdict:
    """Score the same characters with a context inside the trained length, and with longer ones, by each rule."""
    lengths = (LENGTH, 3 * LENGTH // 2, 2 * LENGTH, 3 * LENGTH, 4 * LENGTH)

    def arm(rule: Callable[[float], RoPEScaling | None]) -> Callable[[int], dict[str, float | list[float]]]:
        def measures(seed: int) -> dict[str, float | list[float]]:
            model = _rotary(lab, seed)
            losses = [_loss_at_the_end(lab, model, RoPE(scaling=rule(at / LENGTH)), at) for at in lengths]
            plain = _loss_at_the_end(lab, model, RoPE(), 2 * LENGTH)
            return {
                "loss at twice the length": losses[2],
                "share of the rise that is left": (losses[2] - losses[0]) / max(plain - losses[0], 1e-9),
                "loss": losses,
                "characters in the window": [float(at) for at in lengths],
            }

        return measures

    verdict = lab.compare(
        arms={
            "NTK": arm(lambda factor: NTKScaling(factor=factor)),
            "linear": arm(lambda factor: LinearScaling(factor=factor)),
            "plain": arm(lambda factor: None),
        },
        main=Beats("NTK", "plain", on="loss at twice the length", by=0.05, lower=True),
        also=[AtMost("NTK", 0.5, on="share of the rise that is left")],
        seeds=3,
        note=f"Trained for {_steps(lab.scale)} steps on windows of {LENGTH}; the loss is that of the last 32 "
        "characters of each window, the same characters at every length. Nothing is trained after rescaling, which "
        "linear interpolation needs: it makes distances of the training rare ones.",
    )
    lab.curves("loss", x="characters in the window", name="lengths", title="Loss of the last 32 characters, nats")
    return verdict


def _loss_at_the_end(lab: Lab, model: DecoderModel, rope: RoPE, length: int) -> float:
    """The loss of the last 32 characters of each window of 256, seen through the last `length` of it."""
    longest, scored = 4 * LENGTH, 32
    rescaled = _with_rope(model.spec, rope).build()
    rescaled.load_state_dict(model.state_dict())
    windows: list[Batch] = []
    for batch in play().held_out_windows(length=longest, count=lab.pick(smoke=4, small=200)):
        targets = batch["targets"][:, -length:].clone()
        targets[:, :-scored] = -100  # not scored
        windows.append({"tokens": batch["tokens"][:, -length:], "targets": targets})
    with lab.threads(1):
        return train.evaluate(rescaled, train.next_token_loss, windows)["loss"]
