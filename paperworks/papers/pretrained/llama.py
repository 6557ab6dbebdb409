"""LLaMA: RMSNorm before each part, SwiGLU, rotary positions; checked on the real SmolLM2, which is built like it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks import api, checkpoints
from paperworks.data.assets import assets
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.models import Block, Decoder, count_parameters, preset
from paperworks.nn import MLP, Attention, LayerNorm
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, learned_positions, play, trained

paper = Paper(
    key="llama",
    title="LLaMA: Open and Efficient Foundation Language Models",
    authors="Touvron, Lavril, Izacard, Martinet, Lachaux, Lacroix, Roziere, Goyal, Hambro, Azhar, et al.",
    year=2023,
    ref="arXiv:2302.13971",
    family="pretrained",
    summary=(
        "A decoder with three changes that later models kept: RMSNorm before each part, SwiGLU in the feed-forward "
        "part, rotary positions in every layer; trained on public data, the 13B model beats GPT-3."
    ),
    implements=("paperworks.models.presets.families.llama", "paperworks.models.decoder.Decoder"),
    equation=(
        r"x \leftarrow x + \operatorname{Attn}(\operatorname{RMSNorm}(x); \operatorname{RoPE}), \; x \leftarrow x + "
        r"\operatorname{SwiGLU}(\operatorname{RMSNorm}(x))"
    ),
    usage="""
import paperworks as pw
from paperworks.models import count_parameters, preset

print("llama-7b:", count_parameters(preset("llama-7b")), "parameters")
model = pw.load("smollm2")  # or a folder of Hugging Face's, or a .gguf file
print(pw.chat(model, [{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=8))
""",
)

QUESTION = "What is the capital of France?"
SENTENCES = (
    "The lighthouse keeper climbed the narrow stairs every evening to light the lamp. When the storm came from the "
    "north, he could see the ships turn towards the harbour, one after the other, like birds going home."
)
Pairs = Literal["adjacent", "halves"]


def equations(file: Any, tokens: Int[Tensor, " time"], pairs: Pairs, dtype: torch.dtype) -> Float[Tensor, "time vocab"]:
    """Return the logits of a GGUF file's model, computed as the paper writes them, one layer after the other.

    Nothing of `paperworks.nn` is used, and the rows of queries and keys stay in the file's order. pairs: which channels
    of a head are rotated together: "adjacent" (2i, 2i + 1), as the file means it, or "halves" (i, i + half).
    """
    meta = {name.removeprefix("llama."): value for name, value in file.metadata.items()}
    heads, kv_heads = meta["attention.head_count"], meta["attention.head_count_kv"]
    size = meta["embedding_length"] // heads
    time = len(tokens)
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    theta = meta["rope.freq_base"] ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    angles = torch.arange(time, dtype=torch.float64)[:, None, None] * theta
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def weight(name: str) -> Tensor:
        found: Tensor = file.tensors[f"{name}.weight"].load(dtype)
        return found

    def norm(a: Tensor, name: str) -> Tensor:
        return a / (a.square().mean(-1, keepdim=True) + meta["attention.layer_norm_rms_epsilon"]).sqrt() * weight(name)

    def rotated(a: Tensor) -> Tensor:
        first, second = (a[..., 0::2], a[..., 1::2]) if pairs == "adjacent" else a.chunk(2, -1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(turned, -1).flatten(-2) if pairs == "adjacent" else torch.cat(turned, -1)

    table = weight("token_embd")
    x = table[tokens]
    for layer in range(meta["block_count"]):
        blk = f"blk.{layer}"
        a = norm(x, f"{blk}.attn_norm")
        q = rotated((a @ weight(f"{blk}.attn_q").T).view(time, heads, size))
        k = rotated((a @ weight(f"{blk}.attn_k").T).view(time, kv_heads, size))
        v = (a @ weight(f"{blk}.attn_v").T).view(time, kv_heads, size)
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(size)
            mixed.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(mixed, -1) @ weight(f"{blk}.attn_output").T
        a = norm(x, f"{blk}.ffn_norm")
        gate = a @ weight(f"{blk}.ffn_gate").T
        x = x + (gate * gate.sigmoid() * (a @ weight(f"{blk}.ffn_up").T)) @ weight(f"{blk}.ffn_down").T
    return norm(x, "output_norm") @ table.T


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:]).item())


@paper.claim(
    "SmolLM2 answers a question, and its logits equal the reference",
    paper="Section 2.2: the architecture; SmolLM2-135M-Instruct has it, with other sizes and shared key-value heads",
    kind="parity",
    control="the same weights with halves of a head rotated where the file means adjacent channels",
    tour=1,
)
@torch.no_grad()
def answers_and_equals_reference(lab: Lab) -> Verdict:
    """Ask, then compare every logit with the paper's equations in float64, and with the wrong pairs of channels."""
    model = api.load("smollm2")
    answer = api.chat(
        model, [{"role": "user", "content": QUESTION}], max_new_tokens=lab.pick(smoke=4, small=40), temperature=0.0
    )
    lab.text(QUESTION, answer)
    ids = model.tokenizer.encode(SENTENCES, bos=False)
    tokens = torch.tensor(ids[: lab.pick(smoke=6, small=len(ids))])
    ours = model(tokens[None])[0]
    file = checkpoints.read_gguf(assets.fetch("smollm2"))
    with lab.progress("the equations, in float64", 2) as advance:
        expected = equations(file, tokens, "adjacent", torch.float64)
        advance(1)
        wrong = equations(file, tokens, "halves", torch.float32)
        advance(1)
    difference = float((ours.double() - expected).abs().max())
    right, trapped = _perplexity(ours, tokens), _perplexity(wrong, tokens)
    return lab.judge(
        checks={
            "the largest difference of logits is at most 0.001": difference <= 1e-3,
            "the likeliest next token is the same everywhere": torch.equal(ours.argmax(-1), expected.argmax(-1)),
            "the answer names Paris": "Paris" in answer,
            "the wrong pairs change logits by more than 1": float((wrong - ours).abs().max()) > 1,
            "and raise perplexity, silently": trapped > right,
        },
        measured={
            "largest difference of logits": difference,
            "largest logit": float(expected.abs().max()),
            "logits compared": expected.numel(),
            "perplexity": right,
        },
        control={
            "perplexity, halves rotated": trapped,
            "largest difference of logits, halves rotated": float((wrong - ours).abs().max()),
        },
        note=f"Two sentences, {len(tokens)} tokens. The file holds the published weights rounded to Q4_1; both sides "
        "read the same rounded numbers.",
    )


SIZES = {  # parameters: by the widths and depths of Table 2 and the published vocabulary of 32,000
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "smollm2-135m": 134_515_008,
}


def feedforward_width(dim: int) -> int:
    """Return 2/3 of 4 dim, rounded up to a multiple of 256."""
    return -(-int(2 / 3 * 4 * dim) // 256) * 256


@paper.claim(
    "The models have their published parameter counts, feed-forward widths and cache sizes",
    paper="Table 2 (6.7B, 13.0B, 32.5B, 65.2B) and Section 2.2: 2/3 of 4d in the feed-forward part",
    kind="exact",
)
def sizes_are_exact(lab: Lab) -> Verdict:
    """Count parameters without memory, and compare a real cache with 2 * layers * heads * width * bytes."""
    counted = {name: count_parameters(preset(name)) for name in SIZES}
    rows = []
    widths, caches = True, True
    for name in SIZES:
        spec = preset(name)
        mixer, feedforward = spec.blocks[0].mixer, spec.blocks[0].feedforward
        assert isinstance(mixer, Attention)
        hidden = getattr(feedforward, "hidden", 0)
        if name.startswith("llama"):
            widths = widths and hidden == feedforward_width(spec.dim)
        formula = 2 * spec.depth * (mixer.kv_heads or mixer.heads) * mixer.head_size(spec.dim)
        with torch.device("meta"):
            held = spec.build().half().new_cache(1, 1024).bytes()
        caches = caches and held == 1024 * 2 * formula
        rows.append([name, counted[name], hidden, 2 * formula])
    lab.table("Sizes", ["model", "parameters", "feed-forward width", "cache bytes a token, two bytes a number"], rows)
    return lab.judge(
        checks={"parameters": counted == SIZES, "feed-forward widths": widths, "cache bytes": caches},
        measured={**counted, "cache bytes a token": [row[3] for row in rows]},
    )


def _variants(base: Decoder) -> dict[str, Decoder]:
    """LLaMA, LLaMA with one ingredient put back to what it replaced, and the GPT-2-style model."""
    block = base.blocks[0]
    mixer = block.mixer
    assert isinstance(mixer, Attention)
    plain = MLP(hidden=4 * base.dim, activation="gelu_tanh")
    return {
        "LLaMA": base,
        "LayerNorm for RMSNorm": replace(base, norm=LayerNorm(), block=replace(block, norm=LayerNorm())),
        "GELU for SwiGLU": replace(base, block=replace(block, feedforward=plain)),
        "learned positions for RoPE": replace(
            base, position=learned_positions(), block=replace(block, mixer=replace(mixer, position=None))
        ),
        "GPT-2 style": replace(
            base,
            norm=LayerNorm(),
            position=learned_positions(),
            block=Block(norm=LayerNorm(), mixer=Attention(heads=mixer.heads, bias=True), feedforward=plain),
        ),
    }


@paper.claim(
    "LLaMA learns more than a GPT-2-style model of its size, and rotary positions do most of it",
    paper="Section 2.2 takes its three changes from GPT-3, PaLM and GPT-Neo and compares none of them",
    control="the GPT-2-style model: LayerNorm, GELU, learned positions and biases, as many parameters and steps",
    reach="real",
)
def learns_more_than_gpt2(lab: Lab) -> Verdict:
    """Train the two, and LLaMA with one of its three ingredients put back, on characters of tinyshakespeare."""
    steps = lab.pick(smoke=2, small=350, large=3000)
    play()  # before the bars: it may have to be fetched
    variants = _variants(character_llama(depth=lab.pick(smoke=1, small=2)))

    def arm(spec: Decoder) -> Callable[[int], dict[str, float]]:
        return lambda seed: {
            "loss": held_out_loss(lab, trained(lab, spec, steps, seed, "training")),
            "parameters": count_parameters(spec),
        }

    without_rope = "learned positions for RoPE"
    verdict = lab.compare(
        arms={name: arm(spec) for name, spec in variants.items()},
        main=Beats("LLaMA", "GPT-2 style", on="loss", by=0.05, lower=True),
        also=[
            Within("LLaMA", "GPT-2 style", on="parameters", by_ratio=0.03),
            *(
                Beats(name, without_rope, on="loss", lower=True)
                for name in ("LayerNorm for RMSNorm", "GELU for SwiGLU")
            ),
        ],
        seeds=3,
        note=f"2 layers, width 64, {steps} steps of 1,024 characters, peak rate {LR} for all; nats a character on the "
        "last tenth. The runs are short: what counts is how fast a model learns.",
    )
    lab.points("loss", name="ablation", title="LLaMA, each of its ingredients put back, and GPT-2")
    return verdict
