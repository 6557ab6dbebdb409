"""The small language models of these papers: characters of tinyshakespeare, one recipe, one way to score them."""

from __future__ import annotations

from functools import cache

import torch

from paperworks import train
from paperworks.data.text.windows import CharacterText
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, LearnedPositions, RMSNorm, RoPE
from paperworks.testbeds.training import fit

LENGTH = 64  # characters in a window: two lines of the play
BATCH = 16
HELD_OUT = 512  # windows of the last tenth of the play, 32,768 characters
LR = 3e-3  # the rate at which the catalogue of methods asks for "no norm" to fail; small models bear it


@cache
def play() -> CharacterText:
    """Tinyshakespeare, the last tenth held out; raises AssetUnavailable when it cannot be had."""
    return CharacterText.load("tinyshakespeare", download=True)


def character_llama(dim: int = 64, depth: int = 4, heads: int = 4, hidden: int = 176) -> Decoder:
    """LLaMA's architecture with one token a character."""
    return Decoder(
        vocab_size=play().tokenizer.vocab_size,
        dim=dim,
        depth=depth,
        norm=RMSNorm(),
        block=Block(norm=RMSNorm(), mixer=Attention(heads=heads, position=RoPE()), feedforward=GatedMLP(hidden=hidden)),
    )


def learned_positions() -> LearnedPositions:
    """One trained vector for each place in a window."""
    return LearnedPositions(length=LENGTH)


def trained(lab: Lab, spec: Decoder, steps: int, seed: int, description: str) -> DecoderModel:
    """Build a model and train it from `seed`, which decides its weights and the windows it sees."""
    torch.manual_seed(seed)
    return further_trained(lab, spec.build(), steps, seed, description)


def further_trained(lab: Lab, model: DecoderModel, steps: int, seed: int, description: str) -> DecoderModel:
    """Train a model by the one recipe: AdamW (0.9, 0.95), decay 0.1, clip 1, a tenth of warm-up, cosine to 10%."""
    batches = play().train_windows(length=LENGTH, batch=BATCH, count=steps, seed=seed)
    adam = train.AdamW(betas=(0.9, 0.95), weight_decay=0.1)
    with lab.threads(1), lab.progress(description, steps) as advance:
        fit(
            model, train.next_token_loss, batches, steps=steps, lr=LR, seed=seed,
            optimizer=adam, warmup=0.1, on_step=lambda _: advance(1),
        )  # fmt: skip
    return model.eval()


def held_out_loss(lab: Lab, model: DecoderModel) -> float:
    """The loss in nats a character on the last tenth of the play."""
    windows = play().held_out_windows(length=LENGTH, count=lab.pick(smoke=16, small=HELD_OUT))
    with lab.threads(1):
        return train.evaluate(model, train.next_token_loss, windows)["loss"]
