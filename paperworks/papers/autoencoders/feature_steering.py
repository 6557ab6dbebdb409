"""Feature steering: a latent that reads capitals, clamped far above what it ever had, makes SmolLM2 write capitals."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks import api, interpret
from paperworks.generation.prompts import left_pad
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.clamping import clamp, largest_strengths
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.models.presets.families import llama
from paperworks.nn import Placement
from paperworks.testbeds import smollm2_activations as activations
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="feature-steering",
    title="Scaling Monosemanticity: influence on behaviour (feature clamping, Golden Gate Claude)",
    authors="Templeton, Conerly, Marcus, Lindsey, Bricken, Chen et al.",
    year=2024,
    ref="transformer-circuits.pub/2024/scaling-monosemanticity",
    family="autoencoders",
    summary=(
        "Hold one feature of a sparse autoencoder at a multiple of the largest activation it ever had, leave all "
        "else as it is, the autoencoder's own error included, and the model writes what the feature stands for."
    ),
    implements=(
        "paperworks.interpret.sae.evaluation.clamping.clamp",
        "paperworks.interpret.sae.evaluation.clamping.push",
        "paperworks.interpret.sae.evaluation.clamping.largest_strengths",
    ),
    equation=r"x' = x + \Big( \frac{c}{\lVert W_{\mathrm{dec},i} \rVert} - f_i(x) \Big) W_{\mathrm{dec},i}, \qquad "
    r"c = k \max_{\mathrm{corpus}} f_i \lVert W_{\mathrm{dec},i} \rVert",
    usage="""
import paperworks as pw
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.clamping import clamp

model = pw.load("smollm2")
autoencoder = sae.TopK(latents=1152, k=32).build(model.spec.dim)  # or one that was trained: sae.load(folder)
with clamp(model, "blocks.15", autoencoder, {787: 200.0}):  # latent 787 held at 200, the error kept
    print(pw.generate(model, ["The weather in the mountains is"], max_new_tokens=8, temperature=0.0)[0])
""",
    notes=(
        "A dictionary of 1,152 latents and a latent that reads capitals, where the paper has millions and the Golden "
        "Gate Bridge. At five times its maximum the latent writes pieces of words in capitals and no sentence."
    ),
)

CONTEXT = activations.CONTEXT
LATENTS = 1152  # twice the dimensions of SmolLM2
MULTIPLES = (-1, 0, 1, 2, 5)  # of the largest activation seen
TIMES_MEDIAN = 5  # activations longer than so many medians are attention sinks
DRAWS = 3  # random directions, and other latents, that the effect is compared with
PROMPTS = (
    *("The weather in the mountains is", "My favourite meal is a bowl of", "Last summer we travelled by"),
    *("A computer follows instructions that", "Plants need water and", "She opened the door and found"),
    *("The history of the city begins with", "To learn a language you should", "In the evening the children"),
    *("The old man walked slowly to the", "We went to the market to buy", "The teacher asked the students to"),
)


@dataclass(frozen=True)
class Steered:
    """SmolLM2, a dictionary of its own scale, and the latent that tells capitals best."""

    model: DecoderModel
    tap: str
    dictionary: sae.SparseAutoencoder
    longest: float
    latent: int
    largest: float
    f1: float  # on contexts that nothing was chosen by
    live: Int[Tensor, " live"]
    words: str

    def clamped(self, multiple: float, dictionary: sae.SparseAutoencoder | None = None) -> Any:
        """Hold the latent at a multiple of its largest activation."""
        own = self.dictionary if dictionary is None else dictionary
        return clamp(self.model, self.tap, own, {self.latent: multiple * self.largest}, longest=self.longest)

    def pointing(self, direction: Float[Tensor, " dim"]) -> sae.SparseAutoencoder:
        """The dictionary with another direction for the latent: clamped, it moves x as far, but elsewhere."""
        changed = deepcopy(self.dictionary)
        with torch.no_grad():
            row = changed.decoder[self.latent]
            row.copy_(direction * (row.norm() / direction.norm()))
        return changed


def _contexts(lab: Lab, model: DecoderModel, seed: int) -> tuple[Int[Tensor, "n time"], Int[Tensor, "n time"], str]:
    """Contexts of text as it is, and of other text of the same kind in capitals."""
    tokenizer: Any = model.tokenizer
    text = scored_text(tokenizer, lab.pick(smoke=16, small=144) * CONTEXT)
    contexts = text.tokens.view(-1, CONTEXT)
    contexts = contexts[torch.randperm(len(contexts), generator=lab.generator(seed))]
    plain, others = contexts.chunk(2)
    loud = [tokenizer.encode(tokenizer.decode(row.tolist()).upper(), bos=False)[:CONTEXT] for row in others]
    return plain, torch.tensor([row for row in loud if len(row) == CONTEXT]), text.words


def _letters(model: DecoderModel) -> tuple[Bool[Tensor, " vocab"], Bool[Tensor, " vocab"]]:
    """Mark the tokens that hold a small letter, and those that hold capitals only, two or more of them."""
    tokenizer: Any = model.tokenizer
    words = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
    small = [any(character.islower() for character in word) for word in words]
    capitals = [len(word) > 1 and word.isalpha() and word.isupper() for word in words]
    return torch.tensor(small), torch.tensor(capitals)


def _f1(on: Bool[Tensor, "rows latents"], other: Bool[Tensor, "rows latents"]) -> Float[Tensor, " latents"]:
    """2 TP / (2 TP + FP + FN) of "the latent is on" for the first rows against the others."""
    hits, wrong = on.double().sum(dim=0), other.double().sum(dim=0)
    return 2 * hits / (hits + wrong + len(on))


@cache
def _steered(lab: Lab, seed: int) -> Steered:
    """Train a TopK dictionary on text of both kinds, and choose a latent by labels."""
    model = smollm2(lab).eval()
    tap = lab.pick(smoke="blocks.0", small=activations.TAP)
    plain, loud, words = _contexts(lab, model, seed)
    small, capitals = (mask.to(lab.device) for mask in _letters(model))
    kept = max(2, len(loud) // 6)  # contexts of each kind to label: half to choose by, half to measure with
    shown = torch.cat([plain[kept:], loud[kept:]])
    shown = shown[torch.randperm(len(shown), generator=lab.generator(seed))].to(lab.device)
    longest = TIMES_MEDIAN * sae.Activations(model, tap, list(shown[:16].split(8))).median_length(1024)
    parts = []
    source = sae.Activations(model, tap, list(shown.split(8)), longest=longest)
    for rows in lab.track(source.rows(), "activations of SmolLM2", total=-(-len(shown) // 8)):
        parts.append(rows)
    rows = torch.cat(parts)
    factor = (rows.shape[1] / float(rows.square().sum(dim=1).mean())) ** 0.5
    where = activations.Setting(model, tap, rows * factor, rows[:0], [], factor, longest, words)
    spec = sae.TopK(latents=lab.pick(smoke=128, small=LATENTS), k=32, aux=0.0)
    with lab.threads(1):
        dictionary = activations.fitted(
            lab, where, spec, steps=lab.pick(smoke=4, small=300), lr=1e-3, clip=1.0, seed=seed
        )
    dictionary.rescale(1 / factor)

    def on(contexts: Tensor, mask: Tensor) -> Tensor:
        labelled = sae.Activations(
            model, tap, list(contexts.to(lab.device).split(8)), keep=lambda batch: mask[batch], longest=longest
        )
        with torch.no_grad():
            return torch.cat([dictionary.encode(part) > 0 for part in labelled.rows()])

    halves = [slice(0, kept // 2), slice(kept // 2, kept)]
    chosen, checked = (_f1(on(loud[half], capitals), on(plain[half], small)) for half in halves)
    latent = int(chosen.argmax())
    largest = largest_strengths(dictionary, rows.split(2048))
    live = ((dictionary.encode(rows[:2048]) > 0).double().mean(dim=0) > 0.001).nonzero().flatten()
    return Steered(model, tap, dictionary, longest, latent, float(largest[latent]), float(checked[latent]), live, words)


@torch.inference_mode()
def _chance(lab: Lab, model: DecoderModel, capitals: Tensor) -> float:
    """The model's chance that the next token is in capitals, mean of the prompts."""
    tokenizer: Any = model.tokenizer
    prompts = lab.pick(smoke=PROMPTS[:2], small=PROMPTS)
    tokens, segments = left_pad([tokenizer.encode(prompt) for prompt in prompts], model.device)
    chances = model(tokens, Placement(segments=segments), last=1)[:, -1].softmax(dim=-1)
    return float(chances[:, capitals].sum(dim=-1).mean())


@paper.claim(
    "A latent that reads capitals, held at five times its largest activation, makes SmolLM2 write capitals",
    paper="'Influence on behavior': features clamped to 5 or 10 times their maximum make the model do what they stand "
    "for, as when it takes itself for the Golden Gate Bridge",
    control="random directions in the latent's place, moving every activation just as far; and other latents' ones",
)
def writes_what_the_feature_reads(lab: Lab) -> Verdict:
    """Choose the latent by labelled text, clamp it at rising levels, and weigh capitals among the next tokens."""
    seen: list[tuple[int, Steered]] = []

    def arm(kind: str) -> Callable[[int], dict[str, float | list[float]]]:
        def run(seed: int) -> dict[str, float | list[float]]:
            steered = _steered(lab, seed)
            seen.append((seed, steered))
            _, capitals = _letters(steered.model)
            capitals = capitals.to(lab.device)
            plain = _chance(lab, steered.model, capitals)
            chances = []
            for multiple in MULTIPLES:
                found = []
                for dictionary in _dictionaries(lab, steered, kind, seed):
                    with steered.clamped(multiple, dictionary):
                        found.append(_chance(lab, steered.model, capitals))
                chances.append(fmean(found))
            at = dict(zip(MULTIPLES, chances, strict=True))
            rising = [at[multiple] for multiple in MULTIPLES if multiple >= 0]
            return {
                "chance of capitals at 5 times, percent": 100 * at[5],
                "times the unchanged at 5": at[5] / plain,
                "times the unchanged at 2": at[2] / plain,
                "times the unchanged at -1": at[-1] / plain,
                "steps that rise, of three from 0 to 5": sum(low < high for low, high in pairwise(rising)),
                "F1 of the latent on other text": steered.f1,
                "multiple": list(map(float, MULTIPLES)),
                "chance of capitals": chances,
            }

        return run

    ours, blind, others = "the latent for capitals", "random directions", "other latents"
    verdict = lab.compare(
        arms={ours: arm(ours), blind: arm(blind), others: arm(others)},
        main=Beats(ours, blind, on="chance of capitals at 5 times, percent", by=20),
        also=[
            Beats(ours, others, on="chance of capitals at 5 times, percent", by=20),
            AtLeast(ours, 3, on="times the unchanged at 5"),
            AtLeast(ours, 3, on="times the unchanged at 2"),
            AtMost(ours, 1, on="times the unchanged at -1"),
            AtLeast(ours, 3, on="steps that rise, of three from 0 to 5"),
            AtMost(blind, 1.3, on="times the unchanged at 5"),
        ],
        seeds=2,
        note=f"Text, half of it in capitals; TopK with {LATENTS} latents, 32 on, after block 15 of 30, 300 steps of "
        "256. A latent is chosen by the F1 of being on for tokens in capitals against tokens with small letters, and "
        f"clamped at every position but attention sinks, over {len(PROMPTS)} prompts; controls are the mean of "
        f"{DRAWS}. A push of five times the largest activation is longer than a typical activation and changes what is "
        "written in any direction, so that random directions exceed the bar of 1.3 times, set for the first design.",
    )
    lab.curves("chance of capitals", x="multiple", log="y", name="capitals", title="Chance of a word in capitals next")
    _show(lab, *seen[0])
    return verdict


def _dictionaries(lab: Lab, steered: Steered, kind: str, seed: int) -> list[sae.SparseAutoencoder]:
    """The dictionary itself, or ones whose latent points elsewhere: at random, or where other latents do."""
    draws, count = lab.generator(seed), lab.pick(smoke=1, small=DRAWS)
    rows = steered.dictionary.decoder.detach()
    if kind == "random directions":
        return [steered.pointing(row) for row in torch.randn(count, rows.shape[1], generator=draws).to(rows)]
    if kind == "other latents":
        among = steered.live[steered.live != steered.latent].cpu()
        chosen = among[torch.randperm(len(among), generator=draws)[:count]]
        return [steered.pointing(row) for row in rows[chosen.to(rows.device)]]
    return [steered.dictionary]


def _show(lab: Lab, seed: int, steered: Steered) -> None:
    """Put what the model writes into the report."""
    lab.text("Text that the dictionary is trained on", steered.words)
    tokens = lab.pick(smoke=2, small=16)
    prompts = list(lab.pick(smoke=PROMPTS[:1], small=PROMPTS[:3]))
    written = {"unchanged": api.generate(steered.model, prompts, max_new_tokens=tokens, temperature=0.0)}
    (elsewhere, *_) = _dictionaries(lab, steered, "random directions", seed)
    for name, dictionary, multiple in (
        ("at 2 times", None, 2),
        ("at 5 times", None, 5),
        ("a random direction at 5 times", elsewhere, 5),
    ):
        with steered.clamped(multiple, dictionary):
            written[name] = api.generate(steered.model, prompts, max_new_tokens=tokens, temperature=0.0)
    lab.table("What SmolLM2 writes, greedily", ["prompt", *written], zip(prompts, *written.values(), strict=True))


@paper.claim(
    "A clamp moves along one decoder row, and to the present activation it moves nothing, however bad the autoencoder",
    paper="Methods: x = SAE(x) + error(x); features are clamped in SAE(x), and error(x) is left as it was",
    kind="exact",
)
def keeps_the_error(lab: Lab) -> Verdict:
    """Clamp latents of an untrained dictionary at SmolLM2's middle, and compare with the definition."""
    model = smollm2(lab).eval()
    tap = lab.pick(smoke="blocks.0", small=activations.TAP)
    tokens = scored_text(model.tokenizer, 64).tokens[None].to(lab.device)
    torch.manual_seed(lab.seed)
    x = _at(model, tap, tokens)
    own = sae.TopK(latents=256, k=16).build(x.shape[-1]).to(lab.device).eval()
    with torch.no_grad():
        own.decoder.mul_(torch.linspace(0.2, 3.0, 256, device=lab.device)[:, None])  # units matter: no unit rows
        plain = model(tokens)
        present = own.strength(own.encode(x))
        latent = int((present > 0).sum(dim=(0, 1)).argmax())
        with clamp(model, tap, own, {latent: present[..., latent]}):
            unmoved = torch.equal(model(tokens), plain)
        lost = float((x - own(x)).norm() / x.norm())
        exact, wide = deepcopy(own).double(), x.double()
        here = torch.nn.Sequential(torch.nn.Identity())
        apart, off = 0.0, 0.0
        latents = exact.encode(wide)
        length = exact.decoder[latent].norm()
        for level in (-20.0, 0.0, 3.0, 50.0):
            replaced = latents.clone()
            replaced[..., latent] = level / length
            wanted = exact.decode(replaced) + (wide - exact.decode(latents))
            with clamp(here, "0", exact, {latent: level}):
                found = here(wide)
            apart = max(apart, float((found - wanted).abs().max()))
            if level == 0:
                without = wide - latents[..., latent, None] * exact.decoder[latent]
                off = float((found - without).abs().max())
    return lab.judge(
        checks={
            "to the present activation: no bit of the logits changes": unmoved,
            # float64 rounding of activations of some thousands at the first token.
            "decode(f') + error, to 1e-9": apart < 1e-9,
            "0 takes f_i decoder_i away, to 1e-9": off < 1e-9,
            "though the reconstruction alone would lose a tenth of the activations or more": lost > 0.1,
        },
        measured={
            "largest difference from decode(f') + error": apart,
            "largest difference at 0": off,
            "||x - SAE(x)|| / ||x||, of what is kept": lost,
            "positions at which the latent is on": int((present[..., latent] > 0).sum()),
        },
    )


def _at(model: DecoderModel, tap: str, tokens: Tensor) -> Tensor:
    with torch.no_grad(), interpret.record(model, tap) as seen:
        model(tokens)
    return seen[tap]


@paper.claim(
    "Every generated token is clamped, with a cache as without one",
    paper="Methods: the clamp acts on every position, in the prompt and in what the model writes",
    kind="exact",
)
def acts_on_generated_tokens(lab: Lab) -> Verdict:
    """Generate greedily under a clamp from a random model, with the cache and by whole forward passes."""
    torch.manual_seed(lab.seed)
    model = llama(32, 2, 4, 88, kv_heads=2, vocab_size=60).build().double().eval()
    own = sae.Standard(latents=64, penalty=1.0).build(32).double().eval()
    prompt = torch.arange(12).view(2, 6)
    count = 16

    def slowly() -> Tensor:
        tokens = prompt
        with torch.no_grad():
            for _ in range(count):
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        return tokens[:, -count:]

    def quickly() -> Tensor:
        return api.generate(model, prompt, max_new_tokens=count, temperature=0.0)[:, -count:]

    plain = quickly()
    with clamp(model, "blocks.0", own, {5: 30.0}):
        quick, slow = quickly(), slowly()
    return lab.judge(
        checks={
            "the same tokens with the cache as without": torch.equal(quick, slow),
            "other tokens than without the clamp": not torch.equal(quick, plain),
            "and the model's own again afterwards": torch.equal(quickly(), plain),
        },
        measured={
            "tokens compared": quick.numel(),
            "tokens that the clamp changed": int((quick != plain).sum()),
        },
    )
