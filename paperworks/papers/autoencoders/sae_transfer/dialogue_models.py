"""A small base model, descendants tuned to dialogue, and autoencoders of their activations on one common text."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import adapt, train
from paperworks.core.errors import AssetUnavailable
from paperworks.data.text.texts import PYTHON_DOCS, load_records, load_text
from paperworks.data.text.windows import Batch, CharacterText
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.transfer import rescaled
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE

LENGTH, BATCH = 64, 16
TAP = "blocks.1"  # after the middle of four blocks
LATENTS, STEPS, ROWS = 256, 1000, 512
K = 4  # latents on for an input


@dataclass(frozen=True)
class Tuning:
    """How a descendant is made: steps on dialogue at a peak rate, of all weights or of a LoRA."""

    steps: int
    lr: float
    lora: bool = False


# The base model has 800 steps at 3e-3. Fine-tuning is usually an eighth of that or less, at a tenth of the rate.
TUNINGS = {"full": Tuning(100, 3e-4), "LoRA": Tuning(100, 1e-3, lora=True)}


@dataclass(frozen=True)
class Corpora:
    """Plain text to train a base model on, dialogue to tune it to, in one vocabulary, and what they are, in words."""

    plain: CharacterText
    dialogue: CharacterText
    words: str

    @property
    def vocab_size(self) -> int:
        """The number of different characters."""
        return self.plain.tokenizer.vocab_size

    def both(self, count: int, seed: int) -> list[Batch]:
        """Windows to train on, every second batch of dialogue."""
        parts = [
            text.train_windows(length=LENGTH, batch=BATCH, count=count // 2, seed=seed)
            for text in (self.plain, self.dialogue)
        ]
        return [batch for pair in zip(*parts, strict=True) for batch in pair]

    def held_out(self, count: int) -> list[Batch]:
        """Windows, `count` of each kind that nothing is trained on."""
        return [
            batch
            for text in (self.plain, self.dialogue)
            for batch in text.held_out_windows(length=LENGTH, batch=64, count=count)
        ]


def corpora(most: int) -> Corpora:
    """Plays and word problems, and other problems as dialogue, at most so many characters of each.

    Where the files are missing: Python's documentation, and dialogues made of it.
    """
    try:
        plays = load_text("tinyshakespeare", download=True).text.split("\n\n")
        problems = [
            (row["question"], _spoken(row["answer"])) for row in load_records("gsm8k-train", download=True).rows
        ]
        half = len(problems) // 2
        plain = plays + [f"{question}\n{answer}" for question, answer in problems[:half]]
        spoken = problems[half:]
        words = "Shakespeare's plays and half of GSM8K's word problems; dialogue: the other half"
    except AssetUnavailable:
        sections = [part for part in load_text(PYTHON_DOCS).text.split("\n\n") if len(part) > 40]
        plain = sections[::2]
        spoken = [(f"What comes after {one[:60]!r}?", one[60:]) for one in sections[1::2]]
        words = "Python's documentation (the texts usually taken are not on this machine); dialogue: made of it"
    random.Random(0).shuffle(plain)
    turns = [f"[user]: {question}\n[assistant]: {answer}\n[end]" for question, answer in spoken]
    texts = [re.sub(r"[^\n -~]", "?", "\n\n".join(part)[:most]) for part in (plain, turns)]
    vocabulary = "".join(sorted(set(texts[0] + texts[1])))
    tokenizer = CharacterText.of(vocabulary * 2).tokenizer
    made = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text))
        cut = len(ids) * 9 // 10
        made.append(CharacterText(tokenizer, ids[:cut], ids[cut:]))
    return Corpora(made[0], made[1], words)


def _spoken(answer: str) -> str:
    """A solution without the marks that a calculator reads."""
    return re.sub(r"<<.*?>>", "", answer).replace("####", "The answer is")


def _trained(lab: Lab, model: DecoderModel, batches: object, steps: int, lr: float, description: str) -> DecoderModel:
    options = train.Settings(
        steps=steps,
        lr=lr,
        optimizer=train.AdamW(betas=(0.9, 0.95), weight_decay=0.1),
        warmup=0.1,
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(description, steps) as advance:
        train.fit(model, train.next_token_loss, batches, options, on_step=lambda _: advance(1))  # type: ignore[arg-type]
    return model.eval()


@dataclass(frozen=True)
class Models:
    """A base model and its descendants, and the loss on held-out text of each kind: (plain, dialogue)."""

    text: Corpora
    by_name: dict[str, DecoderModel]
    losses: dict[str, tuple[float, float]]


_MODELS: dict[tuple[str, int], Models] = {}


def dialogue_models(lab: Lab) -> Models:
    """Train a base model on plain text, then tune it to dialogue, whole and by LoRA; once."""
    key = (lab.scale, lab.seed)
    if key in _MODELS:
        return _MODELS[key]
    text = corpora(lab.pick(smoke=20_000, small=2_500_000))
    torch.manual_seed(lab.seed)
    spec = Decoder(
        vocab_size=text.vocab_size,
        dim=64,
        depth=4,
        norm=RMSNorm(),
        block=Block(norm=RMSNorm(), mixer=Attention(heads=4, position=RoPE()), feedforward=GatedMLP(hidden=176)),
    )
    steps = lab.pick(smoke=2, small=800)
    plain = text.plain.train_windows(length=LENGTH, batch=BATCH, count=steps, seed=lab.seed)
    found = {"base": _trained(lab, spec.build(), plain, steps, 3e-3, "base model")}
    for name, tuning in TUNINGS.items():
        model = copy.deepcopy(found["base"])
        if tuning.lora:
            adapt.apply(model, adapt.LoRA(rank=8, alpha=16), targets="all-linear")
        further = lab.pick(smoke=2, small=tuning.steps)
        dialogue = text.dialogue.train_windows(length=LENGTH, batch=BATCH, count=further, seed=lab.seed + 1)
        found[name] = _trained(lab, model, dialogue, further, tuning.lr, f"tuned to dialogue, {name}")
        if tuning.lora:
            adapt.merge(model)
    losses = {}
    count = lab.pick(smoke=4, small=256)
    for name, model in found.items():
        windows = [part.held_out_windows(length=LENGTH, count=count) for part in (text.plain, text.dialogue)]
        with lab.threads(1):
            scored = [train.evaluate(model, train.next_token_loss, part)["loss"] for part in windows]
        losses[name] = (scored[0], scored[1])
    _MODELS[key] = Models(text, found, losses)
    return _MODELS[key]


@dataclass(frozen=True)
class Rows:
    """A model's activations at the tap for the common text, and what brings E ||x||^2 to their dimension."""

    rows: Float[Tensor, "n dim"]
    factor: float

    def batches(self, steps: int, seed: int) -> Iterator[Float[Tensor, "rows dim"]]:
        """Draw batches at the common scale."""
        draws = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.factor * self.rows[torch.randint(len(self.rows), (ROWS,), generator=draws)]


def rows_of(lab: Lab, text: Corpora, model: DecoderModel) -> Rows:
    """Activations of a model at the tap, on both kinds of text."""
    inputs = [batch["tokens"] for batch in text.both(lab.pick(smoke=4, small=120), lab.seed + 2)]
    reader = sae.Activations(model, TAP, inputs)
    longest = 5 * reader.median_length()
    with lab.threads(1):
        rows = torch.cat(list(sae.Activations(model, TAP, inputs, longest=longest).rows()))
    return Rows(rows, (rows.shape[1] / float(rows.square().sum(dim=1).mean())) ** 0.5)


def fitted(
    lab: Lab,
    rows: Rows,
    steps: int,
    seed: int,
    description: str,
    *,
    start: sae.SparseAutoencoder | None = None,
    k: int = K,
) -> sae.SparseAutoencoder:
    """Train an autoencoder from scratch, or on from `start` with a warm-up of the learning rate; in the tap's units.

    TopK, so that all have the same number of latents on: one with a penalty may make up for directions that do not fit
    with ten times as many.
    """
    torch.manual_seed(seed)
    if start is None:
        model = sae.TopK(latents=LATENTS, k=k, aux_k=32, dead_after=100 * ROWS).build(rows.rows.shape[1])
        model.centre(rows.factor * rows.rows[:2048])
    else:
        model = rescaled(start, rows.factor).train()  # type: ignore[assignment]
    training = sae.Training(model, steps)
    options = train.Settings(
        steps=steps,
        lr=2e-3,
        optimizer=train.AdamW(betas=(0.9, 0.999), weight_decay=0.0),
        schedule=train.WarmupStableDecay(decay=0.2),
        warmup=0.0 if start is None else 0.2,
        min_lr=0.0,
        clip=1.0,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(description, steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            advance(1)

        train.fit(model, training.loss, lambda epoch: rows.batches(steps, seed), options, on_step=after_step)
    model.rescale(1 / rows.factor)
    return model.eval()
