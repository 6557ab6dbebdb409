"""RWKV: a mean of all values that fades channel by channel does what attention does, and decodes from a fixed state."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Decoder, DecoderModel, count_parameters, preset
from paperworks.models.presets.families import rwkv4
from paperworks.nn import Placement
from paperworks.nn.recurrent.rwkv import wkv
from paperworks.testbeds.characters import character_llama, held_out_loss, play, trained

paper = Paper(
    key="rwkv",
    title="RWKV: Reinventing RNNs for the Transformer Era",
    authors="Peng, Alcaide, Anthony, Albalak, Arcadinho, Biderman, and 26 others",
    year=2023,
    ref="arXiv:2305.13048",
    family="recurrent",
    summary=(
        "Each channel keeps a mean of all values so far, weighted by their keys and fading at its own rate: trained in "
        "parallel like a transformer, decoded like a recurrent network with a state that does not grow."
    ),
    implements=(
        "paperworks.nn.recurrent.rwkv.RWKV",
        "paperworks.nn.recurrent.rwkv.RWKVChannelMix",
        "paperworks.nn.recurrent.rwkv.wkv",
    ),
)

PUBLISHED = {
    "rwkv4-169m": 169_342_464,
    "rwkv4-430m": 430_397_440,
    "rwkv4-1.5b": 1_515_106_304,
    "rwkv4-3b": 2_984_627_200,
    "rwkv4-7b": 7_392_649_216,
    "rwkv4-14b": 14_148_597_760,
}
DIM, LAYERS = 128, 6


@paper.claim(
    "The recurrence is the paper's sum, whatever the keys, and the models have the published sizes",
    paper="Equation 16 and Appendix D (the stable form); Table 2 and Appendix C (sizes)",
    kind="exact",
    control="the same sum without the shift of exponents",
)
@torch.no_grad()
def recurrence_is_the_sum(lab: Lab) -> Verdict:
    """Compare with the sum term by term in float64; then keys of up to 80 in float32."""
    draws = torch.Generator().manual_seed(lab.seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    key, value, decay, bonus = drawn(2, 40, 8), drawn(2, 40, 8), drawn(8).exp(), drawn(8)
    found = wkv(key, value, decay, bonus)[0]
    shifted = wkv(key + 5.0, value, decay, bonus)[0]
    large = (80 * key / key.abs().max()).float()
    stable = wkv(large, value.float(), decay.float(), bonus.float())[0]
    exact = wkv(large.double(), value, decay, bonus)[0]
    naive = _sum(large.float() + 20, value.float(), decay.float(), bonus.float())
    counts = {name: count_parameters(preset(name)) for name in PUBLISHED}
    checks = {
        "equal to the sum to 1e-12": float((found - _sum(key, value, decay, bonus)).abs().max()) < 1e-12,
        "a constant added to all keys cancels": float((shifted - found).abs().max()) < 1e-12,
        "the first token gives its own value": torch.equal(found[:, 0], value[:, 0]),
        "keys of 80 stay finite and right in float32": float((stable - exact).abs().max()) < 1e-4,
        "the plain sum overflows at 100": not bool(torch.isfinite(naive).all()),
        "all six sizes are the published ones": counts == PUBLISHED,
    }
    measured = {
        "largest difference from the sum": float((found - _sum(key, value, decay, bonus)).abs().max()),
        "largest error with keys of 80, float32": float((stable - exact).abs().max()),
        "parameters": list(counts.values()),
    }
    return lab.judge(checks, measured, {"plain sum, share finite": float(torch.isfinite(naive).float().mean())})


def _sum(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    rows = []
    for t in range(key.shape[1]):
        back = torch.arange(t - 1, -1, -1, dtype=key.dtype)[:, None]
        past, present = torch.exp(-back * decay + key[:, :t]), torch.exp(bonus + key[:, t])
        rows.append(((past * value[:, :t]).sum(1) + present * value[:, t]) / (past.sum(1) + present))
    return torch.stack(rows, 1)


def _recurrent(layers: int = LAYERS) -> Decoder:
    return replace(rwkv4(DIM, layers, vocab_size=play().tokenizer.vocab_size), embedding_std=0.02)


def _attending() -> Decoder:
    return character_llama(dim=DIM, depth=LAYERS, heads=4, hidden=352)


def _forgetful() -> Decoder:
    """The same with time mixing left out: channel mixing alone sees one token back a layer."""
    spec = _recurrent()
    return replace(spec, depth=LAYERS, block=spec.blocks[1::2])


@paper.claim(
    "A model of equal size learns text as well as a transformer",
    paper="Figure 1 and Section 5: on par with similarly sized transformers trained on the same tokens",
    control="the same model without its time mixing",
)
def learns_text(lab: Lab) -> Verdict:
    """Six layers of width 128 on characters of Shakespeare, windows of 64, equal steps."""
    steps = lab.pick(smoke=3, small=600)
    losses, sizes = {}, {}
    for name, spec in (("RWKV", _recurrent()), ("transformer", _attending()), ("no time mixing", _forgetful())):
        model = trained(lab, spec, steps, lab.seed, f"{name} on characters")
        losses[name], sizes[name] = held_out_loss(lab, model), count_parameters(model)
    with lab.figure("losses", figsize=(6.4, 2.4)) as figure:
        axes = figure.subplots()
        names = list(losses)[::-1]
        axes.barh(names, [losses[name] for name in names], color=[CONTROL, COLORS[1], COLORS[0]])
        for index, name in enumerate(names):
            axes.text(losses[name], index, f" {losses[name]:.3f}", va="center")
        axes.set(title=f"Held-out loss after {steps} steps", xlabel="nats a character")
        axes.set_xlim(1.0, 1.12 * max(losses.values()))
    return lab.judge(
        checks={
            "within 0.08 nats of the transformer": losses["RWKV"] <= losses["transformer"] + 0.08,
            "without time mixing at least 0.1 worse": losses["no time mixing"] >= losses["RWKV"] + 0.1,
        },
        measured={"held-out loss": losses["RWKV"], "parameters": sizes["RWKV"], "steps": steps},
        control={
            "held-out loss, transformer": losses["transformer"],
            "parameters, transformer": sizes["transformer"],
            "held-out loss, no time mixing": losses["no time mixing"],
        },
        note=(
            "The transformer is LLaMA's block (SwiGLU, rotary positions), stronger than the paper's. Six layers of "
            "channel mixing still see seven characters, which is most of what so few steps learn to use."
        ),
    )


@paper.claim(
    "A token costs the same to decode at any position",
    paper="Table 1: O(1) time and memory a token, where attention needs O(T)",
    control="a transformer of the same size with its cache",
)
@torch.no_grad()
def decodes_at_one_cost(lab: Lab) -> Verdict:
    """Time single tokens after 100 and after 4,000, the smallest of many; count what the caches hold."""
    places = lab.pick(smoke=(8, 32), small=(100, 4000))
    seconds: dict[str, list[float]] = {}
    held: dict[str, list[int]] = {}
    for name, spec in (("RWKV", _recurrent()), ("transformer", _attending())):
        model = spec.build().eval()
        seconds[name] = [_token_seconds(lab, model, place) for place in places]
        held[name] = [model.new_cache(1, place).bytes() for place in places]
    ratios = {name: values[1] / values[0] for name, values in seconds.items()}
    return lab.judge(
        checks={
            "within 20% at both places": abs(ratios["RWKV"] - 1) <= 0.2,
            "the transformer's token grows by more than 30%": ratios["transformer"] > 1.3,
            "memory does not grow": held["RWKV"][0] == held["RWKV"][1],
        },
        measured={
            "time at the later place / at the earlier": ratios["RWKV"],
            "seconds a token": seconds["RWKV"],
            "bytes held": held["RWKV"],
        },
        control={
            "time at the later place / at the earlier": ratios["transformer"],
            "seconds a token": seconds["transformer"],
            "bytes held": held["transformer"],
        },
    )


def _token_seconds(lab: Lab, model: DecoderModel, place: int) -> float:
    rows = 8  # so that reading the cache counts beside what a token costs anyway
    vocab = model.spec.vocab_size
    times = lab.pick(smoke=3, small=30)
    cache = model.new_cache(rows, place + times)
    draws = torch.Generator().manual_seed(0)
    with lab.threads(1):
        model(torch.randint(vocab, (rows, place), generator=draws), Placement(cache=cache))
        taken = []
        for _ in range(times):
            token = torch.randint(vocab, (rows, 1), generator=draws)
            began = time.perf_counter()
            model(token, Placement(cache=cache))
            taken.append(time.perf_counter() - began)
    return min(taken)
