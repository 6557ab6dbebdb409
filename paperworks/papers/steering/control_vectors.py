"""Control vectors: a direction between two ways of writing, added to the residual stream, changes how a model writes.

Caps in SmolLM2-135M-Instruct: what the first user of repeng could do with a small model as well.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import api, interpret
from paperworks.checkpoints.control_vectors import load_control_vector, save_control_vector
from paperworks.generation.prompts import left_pad
from paperworks.interpret import ControlVector
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
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
    equation=r"x_l \leftarrow x_l + s \, v_l, \qquad v_l = \text{top eigenvector of } \textstyle\sum_i d_i d_i^\top, "
    r"\quad d_i = h_l(\text{text}_i^+) - h_l(\text{text}_i^-)",
    usage="""
import paperworks as pw
import torch
from paperworks import interpret

model = pw.load("smollm2")
loud, quiet = ["THE SEA IS", "MY CAT SLEEPS", "WE WENT HOME"], ["the sea is", "my cat sleeps", "we went home"]
path = "blocks.15"

def states(texts):
    return interpret.last_token_activations(model, [model.tokenizer.encode(text) for text in texts], [path])

vector = interpret.control_vector(states(loud), states(quiet), method="pca_difference")
with vector.apply(model, 6.0):
    print(pw.generate(model, "Tell me about your day.", max_new_tokens=8, temperature=0.0))
""",
    notes="SmolLM2-135M takes up simple controls only, such as capitals, and writes gibberish from strength 16 on. "
    "The file of its weights is 4-bit, decoded. Strength 4 is where steering begins: in one of three draws it was too "
    "weak, while at strength 8 more than 60% of the letters were capitals in each.",
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
STRENGTH = 4.0  # at which the text is written
STRENGTHS = (1.0, 4.0, 8.0)  # at which the first word is looked at


@cache
def _model(device: str) -> DecoderModel:
    return api.load("smollm2", device=device)


def _prompt(model: DecoderModel, persona: str, suffix: str) -> str:
    """A conversation under a persona, up to the middle of the answer."""
    messages = [{"role": "system", "content": persona}, {"role": "user", "content": "Write something."}]
    return api.chat_prompt(model, messages) + suffix


def _pairs(lab: Lab, seed: int, *, same_text: bool = False) -> tuple[list[str], list[str]]:
    """Paired texts of some of the suffixes: capitals and small letters, or only the words of the persona differ."""
    model, count = _model(lab.device), lab.pick(smoke=6, small=12)
    every = [" ".join(sentence.split()[:cut]) for sentence in SENTENCES for cut in CUTS]
    suffixes = [every[row] for row in torch.randperm(len(every), generator=lab.generator(seed))[:count].tolist()]
    loud = [_prompt(model, PERSONAS[0], text if same_text else text.upper()) for text in suffixes]
    quiet = [_prompt(model, PERSONAS[1], text if same_text else text.lower()) for text in suffixes]
    return loud, quiet


@torch.inference_mode()
def _last_states(model: DecoderModel, texts: Sequence[str]) -> dict[str, Float[Tensor, "texts dim"]]:
    """Outputs of the steered blocks at the last token of each text, in left-padded batches."""
    tokenizer: Any = model.tokenizer
    parts: dict[str, list[Tensor]] = {path: [] for path in STEERED}
    for start in range(0, len(texts), 16):
        prompts = [tokenizer.encode(text) for text in texts[start : start + 16]]
        tokens, segments = left_pad(prompts, model.device)
        with interpret.record(model, STEERED) as seen:
            model.hidden(tokens, Placement(segments=segments))
        for path in STEERED:
            parts[path].append(seen[path][:, -1].clone())
    return {path: torch.cat(values) for path, values in parts.items()}


def _vector(lab: Lab, seed: int, *, same_text: bool = False) -> ControlVector:
    loud, quiet = _pairs(lab, seed, same_text=same_text)
    states = _last_states(_model(lab.device), loud + quiet)
    return interpret.control_vector(
        {path: rows[: len(loud)] for path, rows in states.items()},
        {path: rows[len(loud) :] for path, rows in states.items()},
        method="pca_difference",
    )


def _random_vector(lab: Lab, seed: int) -> ControlVector:
    """Unit vectors in random directions, at the same places."""
    drawn = torch.randn(len(STEERED), _model(lab.device).spec.dim, generator=lab.generator(seed)).to(lab.device)
    return ControlVector({path: row / row.norm() for path, row in zip(STEERED, drawn, strict=True)})


def _capitals(texts: Sequence[str]) -> float:
    """Share of upper-case letters among all letters."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return sum(character.isupper() for character in letters) / len(letters) if letters else 0.0


@cache
def _capital_tokens(device: str) -> Tensor:
    """Marks of the tokens that are words in capitals, of two letters or more."""
    tokenizer: Any = _model(device).tokenizer
    words = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
    return torch.tensor([len(word) > 1 and word.isalpha() and word.isupper() for word in words], device=device)


def _questions(lab: Lab, seed: int) -> list[str]:
    """Some of the questions, as prompts; every seed has its own."""
    rows = torch.randperm(len(QUESTIONS), generator=lab.generator(1000 + seed))[: lab.pick(smoke=2, small=4)].tolist()
    model = _model(lab.device)
    return [api.chat_prompt(model, [{"role": "user", "content": QUESTIONS[row]}]) for row in rows]


@torch.inference_mode()
def _first_word(lab: Lab, seed: int, vector: ControlVector, strength: float) -> float:
    """Chance that an answer begins with a word in capitals, mean over the questions."""
    model = _model(lab.device)
    tokenizer: Any = model.tokenizer
    tokens, segments = left_pad([tokenizer.encode(prompt) for prompt in _questions(lab, seed)], model.device)
    with vector.apply(model, strength):
        chances = model(tokens, Placement(segments=segments), last=1)[:, -1].softmax(dim=-1)
    return float(chances[:, _capital_tokens(lab.device)].sum(dim=-1).mean())


def _answers(lab: Lab, seed: int, vector: ControlVector, strength: float) -> list[str]:
    """Greedy answers to the questions under a vector."""
    model, length = _model(lab.device), lab.pick(smoke=3, small=12)
    with vector.apply(model, strength):
        return api.generate(model, _questions(lab, seed), max_new_tokens=length, temperature=0.0)


@paper.claim(
    "Adding one direction makes SmolLM2 answer in capitals, with no training and no prompt",
    paper="repeng: a control vector from contrasting pairs, found in under a minute, changes how a model writes, more "
    "the stronger it is",
    control="random directions of the same length in the same layers",
    reach="real",
    tour=4,
)
def steers_to_capitals(lab: Lab) -> Verdict:
    """Measure the share of capitals in what the model writes, and the chance of a first word in capitals."""

    def arm(name: str, find: Callable[[Lab, int], ControlVector]) -> Callable[[int], dict[str, Any]]:
        def measured(seed: int) -> dict[str, Any]:
            vector = find(lab, seed)
            written = _answers(lab, seed, vector, STRENGTH)
            if seed == lab.seed:
                lab.text(f"Answers, {name}", "\n\n".join(written))
            chances = [_first_word(lab, seed, vector, value) for value in STRENGTHS]
            return {
                "share of capitals": _capitals(written),
                "strength": list(STRENGTHS),
                "chance of a first word in capitals": chances,
                "first word in capitals, strength 8 over 1": chances[-1] / chances[0],
            }

        return measured

    steered, blind = "control vector", "random directions"
    verdict = lab.compare(
        arms={steered: arm(steered, _vector), blind: arm(blind, _random_vector)},
        main=Beats(steered, blind, on="share of capitals", by=0.3),
        also=[
            AtMost(blind, 0.1, on="share of capitals"),
            Beats(steered, blind, on="first word in capitals, strength 8 over 1", by=1.0),
        ],
        seeds=3,
        note="12 pairs of half-written answers; unit vectors added to the outputs of blocks 8 to 20 at every position, "
        f"strength {STRENGTH:g}; 4 questions, 12 tokens each, greedy. The seed draws pairs, questions and random "
        "directions.",
    )
    lab.curves("chance of a first word in capitals", x="strength", name="capitals")
    return verdict


@paper.claim(
    "The pairs must differ in the text itself: the persona alone does not steer so small a model",
    paper="repeng's recipe lets only the persona differ and needs a larger model",
    control="the same suffix in both personas, everything else alike",
    reach="real",
)
def pairs_must_differ_in_the_text(lab: Lab) -> Verdict:
    """Find the vector from pairs with and without the suffix rewritten, and compare what they do."""

    def arm(same_text: bool) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            vector = _vector(lab, seed, same_text=same_text)
            return {
                f"share of capitals, strength {strength:g}": _capitals(_answers(lab, seed, vector, strength))
                for strength in (STRENGTH, 2 * STRENGTH)
            }

        return measured

    rewritten, shared = "suffix rewritten", "suffix shared"
    at = f"share of capitals, strength {STRENGTH:g}"
    return lab.compare(
        arms={rewritten: arm(False), shared: arm(True)},
        main=Beats(rewritten, shared, on=at, by=0.3),
        also=[Beats(rewritten, shared, on=f"share of capitals, strength {2 * STRENGTH:g}")],
        seeds=3,
        note="As above. A larger model may need no rewritten suffix; only SmolLM2-135M was tried.",
    )


@paper.claim(
    "Control vectors add, subtract and scale; no vector and strength 0 leave the model as it is",
    paper="repeng: control vectors can be added, subtracted, negated and scaled; reset() restores the model",
    kind="exact",
)
def algebra_is_linear(lab: Lab) -> Verdict:
    """Check the algebra, the identity of the model, PCA in float64 by another route, and where steering stops."""
    model = _model(lab.device)
    loud, quiet = _pairs(lab, lab.seed)
    states = _last_states(model, loud + quiet)
    vector, other = _vector(lab, lab.seed), _random_vector(lab, lab.seed)
    norms = [value.norm().item() for value in vector.directions.values()]
    nothing = vector - vector
    sum_then_scale, scale_then_sum = 3.0 * (vector + other), 3.0 * vector + 3.0 * other
    apart = max(
        (sum_then_scale.directions[path] - scale_then_sum.directions[path]).abs().max().item() for path in STEERED
    )
    cosines = [_centred_cosine(rows[: len(loud)].double(), rows[len(loud) :].double()) for rows in states.values()]
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
            "pca_center has the same direction in every layer: cosine above 1 - 1e-9": min(cosines) > 1 - 1e-9,
        },
        measured={
            "length, largest difference from 1": max(abs(norm - 1) for norm in norms),
            "largest difference of 3 (v + w)": apart,
            "largest difference of what was added": linear,
            "least cosine with pca_center": min(cosines),
        },
    )


def _centred_cosine(positive: Tensor, negative: Tensor) -> float:
    """Cosine of our direction with the principal component of pairs centred on their midpoints."""
    middle = (positive + negative) / 2
    both = torch.cat([positive - middle, negative - middle])
    # PCA centres its rows; here their mean is zero already, which is the point.
    theirs = torch.linalg.svd(both - both.mean(dim=0), full_matrices=False).Vh[0]
    return torch.dot(interpret.pca_difference(positive, negative), theirs).abs().item()


@torch.inference_mode()
def _effects(model: DecoderModel, vector: ControlVector) -> tuple[bool, bool, float]:
    """Whether strength 0 and leaving the context change nothing, and how far from 4 v the first block moves."""
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
    "A control vector goes through a GGUF file and back without changing a bit",
    paper="repeng: export_gguf writes architecture controlvector, a tensor direction.N a layer; import_gguf reads it",
    kind="exact",
)
def file_round_trip(lab: Lab) -> Verdict:
    """Write random and awkward directions, read them, and compare the bytes."""
    draws = lab.generator(lab.seed)
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
