"""RWKV: a mean of all values that fades channel by channel does what attention does, and decodes from a fixed state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
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
    equation=(
        r"wkv_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t}{\sum_{i<t} e^{-(t-1-i) w + k_i} + "
        r"e^{u + k_t}}"
    ),
    usage="""
import torch
from paperworks.models import count_parameters, preset
from paperworks.models.presets.families import rwkv4

print("rwkv4-169m:", count_parameters(preset("rwkv4-169m")), "parameters")
model = rwkv4(64, 2, vocab_size=100).build()
print(tuple(model(torch.randint(100, (1, 50))).shape))
for length in (10, 10_000):
    print("bytes held after", length, "tokens:", model.new_cache(1, length).bytes())
""",
)

PUBLISHED = {
    "rwkv4-169m": 169_342_464,
    "rwkv4-430m": 430_397_440,
    "rwkv4-1.5b": 1_515_106_304,
    "rwkv4-3b": 2_984_627_200,
    "rwkv4-7b": 7_392_649_216,
    "rwkv4-14b": 14_148_597_760,
}
DIM, LAYERS = 96, 2


@paper.claim(
    "The recurrence is the paper's sum, whatever the keys, and the models have the published sizes",
    paper="Equation 16 and Appendix D (the stable form); Table 2 and Appendix C (sizes)",
    kind="exact",
    control="the same sum without the shift of exponents",
)
@torch.no_grad()
def recurrence_is_the_sum(lab: Lab) -> Verdict:
    """Compare with the sum term by term in float64; then keys of up to 80 in float32."""
    draws = lab.generator(lab.seed)

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
    return character_llama(dim=DIM, depth=LAYERS, heads=4, hidden=264)


def _forgetful() -> Decoder:
    """The same with time mixing left out: channel mixing alone sees one token back a layer."""
    spec = _recurrent()
    return replace(spec, depth=LAYERS, block=spec.blocks[1::2])


@paper.claim(
    "A model of equal size learns text as well as a transformer, by its time mixing",
    paper="Figure 1 and Section 5: on par with similarly sized transformers trained on the same tokens",
    control="the same model without its time mixing; a transformer of the same size",
    reach="real",
)
def learns_text(lab: Lab) -> Verdict:
    """Two layers of width 96 on characters of Shakespeare, windows of 64, equal steps."""
    steps = lab.pick(smoke=3, small=300)
    play()

    def arm(spec: Decoder) -> Callable[[int], dict[str, float]]:
        return lambda seed: {"held-out loss": held_out_loss(lab, trained(lab, spec, steps, seed, "training"))}

    verdict = lab.compare(
        arms={"RWKV": arm(_recurrent()), "no time mixing": arm(_forgetful()), "transformer": arm(_attending())},
        main=Beats("RWKV", "no time mixing", on="held-out loss", by=0.1, lower=True),
        also=[Within("RWKV", "transformer", on="held-out loss", by=0.08, lower=True)],
        seeds=2,
        measured={"parameters, RWKV": count_parameters(_recurrent())},
        note=f"{steps} steps. The transformer is LLaMA's block (SwiGLU, rotary positions), stronger than the paper's. "
        "Without time mixing a layer sees one token back, so two layers see three characters; an earlier design had "
        "six layers, of which channel mixing saw seven, and time mixing was worth 0.06 nats only.",
    )
    lab.points("held-out loss", name="losses", title=f"Nats a character after {steps} steps")
    return verdict


@paper.claim(
    "A token costs the same to decode at any position",
    paper="Table 1: O(1) time and memory a token, where attention needs O(T)",
    control="a transformer of the same size with its cache",
)
@torch.no_grad()
def decodes_at_one_cost(lab: Lab) -> Verdict:
    """Time single tokens after 100 and after 4,000, the smallest of many; count what the caches hold."""
    places = lab.pick(smoke=(8, 32), small=(100, 4000))
    play()

    def arm(spec: Decoder) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = spec.build().eval()
            early, late = (_token_seconds(lab, model, place, seed) for place in places)
            held = [model.new_cache(1, place).bytes() for place in places]
            return {"time, late / early": late / early, "bytes held, late / early": held[1] / held[0]}

        return measures

    return lab.compare(
        arms={"RWKV": arm(_recurrent()), "transformer": arm(_attending())},
        main=Beats("RWKV", "transformer", on="time, late / early", by=1, lower=True),
        also=[AtMost("RWKV", 1.2, on="time, late / early"), AtMost("RWKV", 1, on="bytes held, late / early")],
        seeds=3,
        note=f"A token after {places[0]} and after {places[1]:,}, eight rows at once, one thread.",
    )


def _token_seconds(lab: Lab, model: DecoderModel, place: int, seed: int) -> float:
    rows = 8  # so that reading the cache counts beside what a token costs anyway
    vocab = model.spec.vocab_size
    times = lab.pick(smoke=3, small=30)
    cache = model.new_cache(rows, place + times)
    draws = lab.generator(seed)
    with lab.threads(1):
        model(torch.randint(vocab, (rows, place), generator=draws), Placement(cache=cache))
        taken = []
        for _ in range(times):
            token = torch.randint(vocab, (rows, 1), generator=draws)
            began = time.perf_counter()
            model(token, Placement(cache=cache))
            taken.append(time.perf_counter() - began)
    return min(taken)
