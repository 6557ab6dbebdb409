"""Control vectors: a direction between two ways of writing, added to the residual stream, changes how a model writes.

Caps in SmolLM2-135M-Instruct: what the first user of repeng could do with a small model as well.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import api, interpret
from paperworks.checkpoints.control_vectors import load_control_vector, save_control_vector
from paperworks.generation.prompts import left_pad
from paperworks.interpret import ControlVector
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.nn import Placement

paper = Paper(
    key="control-vectors",
    title="Representation Engineering: A Top-Down Approach to AI Transparency (control vectors, as in repeng)",
    authors="Zou, Phan, Chen, Campbell, Guo, Ren et al.; Vogel (repeng)",
    year=2023,
    ref="arXiv:2310.01405; GitHub vgel/repeng; vgel.me/posts/representation-engineering",
    family="steering",
    summary=(
        "The mean direction between the hidden states of paired opposite texts, added to the residual stream of the "
        "middle layers, steers what a model writes: no training, no prompt, and a dial for how much."
    ),
    implements=(
        "paperworks.interpret.steering.vectors.ControlVector",
        "paperworks.interpret.steering.vectors.control_vector",
        "paperworks.interpret.steering.vectors.pca_difference",
        "paperworks.checkpoints.control_vectors.save_control_vector",
    ),
)

STEERED = [f"blocks.{index}" for index in range(7, 20)]  # the outputs of blocks 8 to 20 of 30, counted from 1
PERSONAS = (
    "You write in ALL CAPS, uppercase letters only.",
    "You write in lower case, small letters only.",
)
SENTENCES = (
    "The weather in the mountains changes quickly, so bring a warm coat and good boots",
    "My favourite meal is a bowl of hot soup with fresh bread and a little butter",
    "Last summer we travelled by train along the coast and stopped in every small town",
    "A computer follows instructions one after another, however long the list may be",
    "Plants need water, light and good soil, and some of them need a little patience",
    "She opened the old wooden door slowly and found a garden nobody had seen for years",
    "The history of the city begins with a small harbour and a handful of fishermen",
    "To learn a language, listen every day and do not be afraid of making mistakes",
)
CUTS = (3, 4, 5, 6, 8, 9, 11, 13)  # words kept of each sentence: 64 suffixes
QUESTIONS = (
    *("Tell me about your day.", "What is the capital of France?", "How do I make a good cup of tea?"),
    *("Describe a walk in the forest.", "Why is the sky blue?", "Write a short poem about the sea."),
    *("What should I cook tonight?", "Tell me a story about a cat.", "How does a bicycle stay upright?"),
    *("Give me advice for a job interview.", "What is a computer?", "Describe your favourite season."),
)
STRENGTHS = (0, 1, 2, 4, 8, 12, 16)
BLIND_STRENGTHS = (4, 8, 16)  # of the random directions
WORKING = (4, 8)  # the strengths at which the claim is made


def _suffixes(lab: Lab) -> list[str]:
    cuts = lab.pick(smoke=CUTS[:1], small=CUTS)
    return [" ".join(sentence.split()[:cut]) for sentence in SENTENCES for cut in cuts]


def _prompt(model: DecoderModel, persona: str, suffix: str) -> str:
    """A conversation under a persona, up to the middle of the answer."""
    messages = [{"role": "system", "content": persona}, {"role": "user", "content": "Write something."}]
    return api.chat_prompt(model, messages) + suffix


def _pairs(lab: Lab, model: DecoderModel, *, same_suffix: bool = False) -> tuple[list[str], list[str]]:
    """Return paired texts: capitals and small letters, or, with `same_suffix`, only the persona's words differ."""
    suffixes = _suffixes(lab)
    loud = [_prompt(model, PERSONAS[0], text if same_suffix else text.upper()) for text in suffixes]
    quiet = [_prompt(model, PERSONAS[1], text if same_suffix else text.lower()) for text in suffixes]
    return loud, quiet


@torch.inference_mode()
def _last_states(
    model: DecoderModel, texts: Sequence[str], paths: Sequence[str]
) -> dict[str, Float[Tensor, "texts dim"]]:
    """Return the outputs of some modules at the last token of each text, in left-padded batches."""
    tokenizer: Any = model.tokenizer
    parts: dict[str, list[Tensor]] = {path: [] for path in paths}
    for start in range(0, len(texts), 16):
        prompts = [tokenizer.encode(text) for text in texts[start : start + 16]]
        tokens, segments = left_pad(prompts, model.device)
        with interpret.record(model, list(paths)) as seen:
            model.hidden(tokens, Placement(segments=segments))
        for path in paths:
            parts[path].append(seen[path][:, -1].clone())
    return {path: torch.cat(values) for path, values in parts.items()}


def _vector(lab: Lab, model: DecoderModel, *, same_suffix: bool = False) -> ControlVector:
    loud, quiet = _pairs(lab, model, same_suffix=same_suffix)
    states = _last_states(model, loud + quiet, STEERED)
    return interpret.control_vector(
        {path: rows[: len(loud)] for path, rows in states.items()},
        {path: rows[len(loud) :] for path, rows in states.items()},
        method="pca_difference",
    )


def _random_vector(lab: Lab, like: ControlVector) -> ControlVector:
    """Unit vectors in random directions, at the same places."""
    draws = torch.Generator().manual_seed(lab.seed)
    drawn = {path: torch.randn(len(value), generator=draws) for path, value in like.directions.items()}
    return ControlVector({path: (value / value.norm()).to(like.directions[path]) for path, value in drawn.items()})


def _capitals(texts: Sequence[str]) -> float:
    """Return the share of upper-case letters among all letters."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return sum(character.isupper() for character in letters) / len(letters) if letters else 0.0


def _capital_tokens(model: DecoderModel) -> Tensor:
    """Mark the tokens that are words in capitals, of two letters or more."""
    tokenizer: Any = model.tokenizer
    words = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
    marked = [len(word) > 1 and word.isalpha() and word.isupper() for word in words]
    return torch.tensor(marked, device=model.device)


def _answers(lab: Lab, model: DecoderModel, vector: ControlVector, strength: float) -> list[str]:
    """Answer the questions greedily under a vector."""
    prompts = _questions(lab, model)
    with vector.apply(model, strength):
        return api.generate(model, prompts, max_new_tokens=lab.pick(smoke=3, small=24), temperature=0.0)


def _questions(lab: Lab, model: DecoderModel) -> list[str]:
    asked = lab.pick(smoke=QUESTIONS[:2], small=QUESTIONS)
    return [api.chat_prompt(model, [{"role": "user", "content": question}]) for question in asked]


@torch.inference_mode()
def _loud_beginnings(lab: Lab, model: DecoderModel, vector: ControlVector, strength: float) -> float:
    """Return the model's chance of beginning an answer with a word in capitals, mean of all questions."""
    tokenizer: Any = model.tokenizer
    tokens, segments = left_pad([tokenizer.encode(prompt) for prompt in _questions(lab, model)], model.device)
    with vector.apply(model, strength):
        chances = model(tokens, Placement(segments=segments), last=1)[:, -1].softmax(dim=-1)
    return float(chances[:, _capital_tokens(model)].sum(dim=-1).mean())


@paper.claim(
    "Adding one direction makes SmolLM2 answer in capitals, with no training and no prompt",
    paper="repeng: a control vector from contrasting pairs, found in under a minute, changes how a model writes, more "
    "the stronger it is; all-caps is the control that its users report to work on small models",
    control="random directions of the same length in the same layers",
    tour=4,
)
def steers_to_capitals(lab: Lab) -> Verdict:
    """Measure the share of capitals at rising strengths of the vector and of a random one, and show the texts."""
    model = api.load("smollm2", device=lab.device)
    vector = _vector(lab, model)
    random = _random_vector(lab, vector)
    strengths = lab.pick(smoke=(0, 4), small=STRENGTHS)
    blind_strengths = [value for value in BLIND_STRENGTHS if value in strengths]
    texts, chances, blind = {}, {}, {}
    for strength in lab.track(strengths, "the control vector"):
        texts[strength] = _answers(lab, model, vector, strength)
        chances[strength] = _loud_beginnings(lab, model, vector, strength)
    for strength in lab.track(blind_strengths, "a random direction"):
        blind[strength] = _answers(lab, model, random, strength)
    reversed_texts = _answers(lab, model, -vector, 4)
    share = {strength: _capitals(written) for strength, written in texts.items()}
    blind_share = {strength: _capitals(written) for strength, written in blind.items()}
    _draw_shares(lab, share, {0: share[0], **blind_share})
    shown = [value for value in WORKING if value in share]
    best = max(shown, key=lambda value: share[value])
    lab.table(
        "What SmolLM2 answers, greedily",
        ["question", "unchanged", *(f"+{value} times the vector" for value in shown), "-4 times the vector"],
        [
            [
                question,
                *(written[row].strip() for written in (texts[0], *(texts[value] for value in shown), reversed_texts)),
            ]
            for row, question in enumerate(QUESTIONS[: min(4, len(texts[0]))])
        ],
    )
    rising = [chance for strength, chance in chances.items() if strength <= 8]
    most_blind = max(value for strength, value in blind_share.items() if strength in WORKING)
    return lab.judge(
        checks={
            "more than 40% capitals at strength 4 or 8": share[best] > 0.4,
            "less than 10% without the vector": share[0] < 0.1,
            "less than 10% with random directions at 4 and 8": most_blind < 0.1,
            "the chance of a first word in capitals rises with every step up to 8": all(
                low < high for low, high in pairwise(rising)
            ),
        },
        measured={
            "share of capitals, best of 4 and 8": share[best],
            "share of capitals, unchanged": share[0],
            "share of capitals, reversed at 4": _capitals(reversed_texts),
            "strengths": list(strengths),
            "share of capitals at each": [round(value, 3) for value in share.values()],
            "chance of a first word in capitals at each": [round(value, 4) for value in chances.values()],
        },
        control={
            "share of capitals, most of 4 and 8": most_blind,
            "strengths": blind_strengths,
            "share of capitals at each": [round(value, 3) for value in blind_share.values()],
        },
        note=f"{len(_suffixes(lab))} pairs of half-written answers; unit vectors added to the outputs of blocks 8 to "
        f"20 at every position; {len(texts[0])} questions, 24 tokens each.",
    )


def _draw_shares(lab: Lab, share: dict[int, float], blind: dict[int, float]) -> None:
    with lab.figure("capitals", figsize=(7.6, 3.5)) as figure:
        axes = figure.subplots()
        axes.plot(list(blind), list(blind.values()), color=CONTROL, marker="s", label="random direction (control)")
        axes.plot(list(share), list(share.values()), color=COLORS[0], marker="o", label="control vector")
        axes.axhline(0.4, color=INK, linewidth=0.8, linestyle=":")
        axes.text(0, 0.42, "what the claim asks for", fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xticks(list(share))
        axes.set_xlabel("strength: times the unit vector, added in 13 layers")
        axes.set_title("Share of capital letters in what SmolLM2 answers")
        axes.legend(loc="upper right")


@paper.claim(
    "The pairs must differ in the text itself: the persona alone does not steer so small a model",
    paper="repeng's recipe lets only the persona differ and needs a larger model; the seed author's experiment "
    "succeeded with simple controls on Llama 3 8B",
    control="the same suffix in both personas, everything else alike",
)
def pairs_must_differ_in_the_text(lab: Lab) -> Verdict:
    """Find the vector from pairs with and without the suffix rewritten, and compare what they do."""
    model = api.load("smollm2", device=lab.device)
    strengths = lab.pick(smoke=(4,), small=(4, 8, 16))
    rewritten, shared = _vector(lab, model), _vector(lab, model, same_suffix=True)
    ours, other = (
        {strength: _capitals(_answers(lab, model, vector, strength)) for strength in lab.track(used, name)}
        for vector, used, name in (
            (rewritten, strengths[:2], "suffix rewritten"),
            (shared, strengths, "suffix shared"),
        )
    )
    alike = [torch.dot(rewritten.directions[path], shared.directions[path]).item() for path in rewritten.directions]
    return lab.judge(
        checks={
            "more than 40% capitals with the suffix rewritten": max(ours.values()) > 0.4,
            "less than 10% with the persona alone, up to 16": max(other.values()) < 0.1,
        },
        measured={
            "share of capitals": [round(value, 3) for value in ours.values()],
            "strengths": list(ours),
        },
        control={
            "share of capitals": [round(value, 3) for value in other.values()],
            "strengths": list(other),
            "cosine with the working vector, mean of 13 layers": sum(alike) / len(alike),
        },
    )


@paper.claim(
    "Control vectors add, subtract and scale; no vector and strength 0 leave the model as it is",
    paper="repeng: control vectors are linear: they can be added, subtracted, negated and scaled; reset() restores the "
    "model",
    kind="exact",
)
def algebra_is_linear(lab: Lab) -> Verdict:
    """Check the algebra of stored directions, the identity of the model, and where steering leaves off."""
    model = api.load("smollm2", device=lab.device)
    vector = _vector(lab, model)
    other = _random_vector(lab, vector)
    norms = [value.norm().item() for value in vector.directions.values()]
    nothing = vector - vector
    sum_then_scale, scale_then_sum = 3.0 * (vector + other), 3.0 * vector + 3.0 * other
    apart = max(
        (sum_then_scale.directions[path] - scale_then_sum.directions[path]).abs().max().item() for path in STEERED
    )
    model_unmoved, restored, linear = _effects(model, vector)
    return lab.judge(
        checks={
            "every direction has length 1, to 1e-6": max(abs(norm - 1) for norm in norms) < 1e-6,
            "v + (-v) is exactly 0": all(not value.any() for value in nothing.directions.values()),
            # Two float32 roundings of numbers below 10.
            "3 (v + w) = 3 v + 3 w, to 1e-6": apart < 1e-6,
            "strength 0 changes no bit of the logits": model_unmoved,
            "after steering every bit is back": restored,
            # A residual stream of up to a few hundred in float32.
            "what is added to one block is strength times v, to 1e-3": linear < 1e-3,
        },
        measured={
            "length, largest difference from 1": max(abs(norm - 1) for norm in norms),
            "largest difference of 3 (v + w)": apart,
            "largest difference of what was added": linear,
            "layers": len(norms),
        },
    )


@torch.inference_mode()
def _effects(model: DecoderModel, vector: ControlVector) -> tuple[bool, bool, float]:
    """Return whether strength 0 and leaving the context change nothing, and how far from 4 v the first block moves."""
    first = STEERED[0]
    tokens = torch.arange(100, 116, device=model.device)[None]
    with interpret.record(model, [first]) as before:
        plain = model(tokens)
    with vector.apply(model, 0.0):
        unmoved = torch.equal(model(tokens), plain)
    with vector.apply(model, 4.0), interpret.record(model, [first]) as after:
        model(tokens)
    restored = torch.equal(model(tokens), plain)
    added = after[first] - before[first]
    return unmoved, restored, (added - 4.0 * vector.directions[first]).abs().max().item()


@paper.claim(
    "Pairs centred on their midpoints have the principal component of the uncentred differences",
    paper="repeng, method pca_center: each pair's midpoint is subtracted and PCA is run on both sides",
    kind="exact",
)
def centred_pca_is_the_second_moment(lab: Lab) -> Verdict:
    """Compare the routes on the hidden states of SmolLM2, in float64."""
    model = api.load("smollm2", device=lab.device)
    loud, quiet = _pairs(lab, model)
    states = _last_states(model, loud + quiet, STEERED)
    cosines, moment_cosines = [], []
    for rows in states.values():
        positive, negative = rows[: len(loud)].double(), rows[len(loud) :].double()
        ours = interpret.pca_difference(positive, negative)
        middle = (positive + negative) / 2
        both = torch.cat([positive - middle, negative - middle])
        # PCA centres its rows; here their mean is zero already, which is the point.
        theirs = torch.linalg.svd(both - both.mean(dim=0), full_matrices=False).Vh[0]
        differences = positive - negative
        moment = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
        cosines.append(torch.dot(ours, theirs).abs().item())
        moment_cosines.append(torch.dot(ours, moment).abs().item())
    return lab.judge(
        checks={
            "the same direction in every layer: cosine above 1 - 1e-9": min(cosines) > 1 - 1e-9,
            "and the top eigenvector of the sum of d d^T, likewise": min(moment_cosines) > 1 - 1e-9,
        },
        measured={
            "least cosine": min(cosines),
            "least cosine with the eigenvector": min(moment_cosines),
            "layers": len(cosines),
        },
    )


@paper.claim(
    "A control vector goes through a GGUF file and back without changing a bit",
    paper="repeng: export_gguf writes architecture controlvector, a tensor direction.N a layer; import_gguf reads it",
    kind="exact",
)
def file_round_trip(lab: Lab) -> Verdict:
    """Write random and awkward directions, read them, and compare the bytes."""
    draws = torch.Generator().manual_seed(lab.seed)
    directions = {path: torch.randn(576, generator=draws) for path in STEERED}
    directions[STEERED[0]][:4] = torch.tensor([0.0, -0.0, 1e-42, math.pi])  # signed zeros and a subnormal
    vector = ControlVector(directions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capitals.gguf"
        save_control_vector(vector, path, model_hint="llama")
        again = load_control_vector(path)
        size = path.stat().st_size
    same = [
        torch.equal(again.directions[name].view(torch.int32), directions[name].view(torch.int32))
        for name in directions
        if name in again.directions
    ]
    return lab.judge(
        checks={
            "every bit of every direction is the same": len(same) == len(directions) and all(same),
            "for the same layers": list(again.directions) == list(directions),
        },
        measured={"directions equal": sum(same), "directions": len(directions), "bytes of the file": size},
    )
