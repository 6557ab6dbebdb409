"""The recurrent network language model: mixed with n-grams it beats both, and it learns on from the text it reads."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from paperworks import train
from paperworks.data.text.texts import load_text
from paperworks.data.text.words import Vocabulary, split_words
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel, NoResidual, count_parameters
from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.models.surgery.interpolation import interpolated, mixture_weights
from paperworks.nn import Elman
from paperworks.nn.identity_norm import NoNorm
from paperworks.train.dynamic_evaluation import dynamic_log_probabilities, stream_log_probabilities
from paperworks.train.streams import Streams

paper = Paper(
    key="rnnlm",
    title="Recurrent Neural Network Based Language Model",
    authors="Mikolov, Karafiat, Burget, Cernocky, Khudanpur",
    year=2010,
    ref="Interspeech 2010, 1045-1048",
    family="recurrent",
    summary=(
        "A simple recurrent network reads words one by one and predicts the next. Averaged with an n-gram model it is "
        "better than either, and it can go on learning from the text that it is tested on."
    ),
    implements=(
        "paperworks.nn.recurrent.classic.Elman",
        "paperworks.train.dynamic_evaluation.dynamic_log_probabilities",
        "paperworks.train.streams.Streams",
        "paperworks.models.classic.kneser_ney.KneserNey",
        "paperworks.models.surgery.interpolation.interpolated",
        "paperworks.data.text.words.Vocabulary",
    ),
)

HIDDEN, ORDER = 100, 5
LEAST = 3  # words seen fewer times are rare: 4,763 ids are left
STREAMS, STEPS_BACK = 16, 20
RATE = 10.0  # on the mean of 320 words: 0.03 a word, where the paper has 0.1 and one word a step
DYNAMIC_RATE, CHUNK = 0.1, 5


@dataclass(frozen=True)
class Words:
    """Shakespeare in three parts, by position: the test part is of two plays that the training part does not hold."""

    vocabulary: Vocabulary
    training: Tensor
    validation: Tensor
    test: Tensor
    known: dict[str, Tensor]


@cache
def _words(most: int | None) -> Words:
    words = split_words(load_text("tinyshakespeare", download=True).text)[:most]
    cuts = round(0.8 * len(words)), round(0.9 * len(words))
    parts = words[: cuts[0]], words[cuts[0] : cuts[1]], words[cuts[1] :]
    vocabulary = Vocabulary.of(parts[0], LEAST)
    training, validation, test = (vocabulary.encode(part) for part in parts)
    known = {"validation": vocabulary.known(parts[1]), "test": vocabulary.known(parts[2])}
    return Words(vocabulary, training, validation, test, known)


def _network(vocab_size: int) -> Decoder:
    """s(t) = sigmoid(U w(t) + W s(t-1)), y(t) = softmax(V s(t)); weights of deviation 0.1."""
    block = Block(norm=NoNorm(), arrangement=NoResidual(), mixer=Elman(activation="sigmoid"))
    return Decoder(vocab_size=vocab_size, dim=HIDDEN, depth=1, block=block, norm=None, init_std=0.1)


def _settings(steps: int, rate: float, clip: float | None) -> train.Settings:
    return train.Settings(
        steps=steps, lr=rate, schedule="constant", warmup=0, optimizer=train.SGD(), clip=clip, save_every=None,
        log_every=steps, progress=False,
    )  # fmt: skip


def _fitted(lab: Lab, words: Words, epochs: int) -> tuple[DecoderModel, list[float]]:
    """Train by plain gradient descent; once an epoch gains less than 1% of perplexity, halve the rate every epoch."""
    torch.manual_seed(lab.seed)
    model = _network(words.vocabulary.size).build()
    streams = Streams(words.training, batch=STREAMS, length=STEPS_BACK)
    rate, halving, perplexities = RATE, False, list[float]()
    with lab.threads(1), lab.progress("epochs", epochs * len(streams)) as advance:
        for _ in range(epochs):
            settings = _settings(len(streams), rate, clip=1.0)
            train.fit(model, streams.loss, streams, settings, on_step=lambda _: advance(1))
            scores = stream_log_probabilities(model, words.validation)
            perplexities.append(_perplexity(words, scores, "validation"))
            halving = halving or (len(perplexities) > 1 and perplexities[-1] > 0.99 * perplexities[-2])
            rate = rate / 2 if halving else rate
    return model.eval(), perplexities


_FITTED: dict[tuple[str, int], tuple[DecoderModel, list[float]]] = {}


def _network_and_words(lab: Lab) -> tuple[DecoderModel, list[float], Words]:
    """Both claims ask the same network; it is trained for the first of them."""
    words = _words(lab.pick(smoke=3_000, small=None))
    key = (lab.scale, lab.seed)
    if key not in _FITTED:
        _FITTED[key] = _fitted(lab, words, lab.pick(smoke=1, small=3))
    return *_FITTED[key], words


def _perplexity(words: Words, scores: Tensor, part: str) -> float:
    """Return the perplexity of the words that the training part has, frequent or rare."""
    ids, known = getattr(words, part)[1:], words.known[part][1:]
    return math.exp(-float(words.vocabulary.of_words(scores, ids)[: len(scores)][known].mean()))


@paper.claim(
    "Every model is a distribution over words, and the dynamic one scores a word before it learns from it",
    paper="Section 2: the network, dynamic models and the rule for rare words",
    kind="exact",
    control="scores after the update",
)
def distributions_and_order(lab: Lab) -> Verdict:
    """Add up probabilities; take the recurrence away; change what comes later; score what was learned from."""
    words = _words(3_000)
    vocabulary = words.vocabulary
    torch.manual_seed(lab.seed)
    model = _network(vocabulary.size).build().double().eval()
    text = words.validation[:60]
    with torch.no_grad():
        logs = model(text[None])[0].log_softmax(-1)
        shares = torch.cat((torch.tensor([len(vocabulary.rare)]), torch.ones(vocabulary.size - 1)))
        every = torch.arange(vocabulary.size)
        network = float((vocabulary.of_words(logs, every).exp() * shares).sum(-1).sub(1).abs().max())
        counts = KneserNey(words.training.tolist(), vocabulary.size, ORDER)
        histories = [text[at - 4 : at].tolist() for at in range(4, 60, 8)]
        sums = [sum(counts.probability(word, history) for word in range(vocabulary.size)) for history in histories]
        bigram: Any = copy.deepcopy(model)
        bigram.blocks[0].mixer.recurrent.weight.zero_()
        other = text.clone()
        other[:-2] = other[:-2].flip(0)
        memory = float((bigram(text[None])[0, -1] - bigram(other[None])[0, -1]).abs().max())
        remembers = float((model(text[None])[0, -1] - model(other[None])[0, -1]).abs().max())
    scores = dynamic_log_probabilities(model, text, lr=DYNAMIC_RATE)
    later = text.clone()
    later[30:] = later[30:].flip(0)
    again = dynamic_log_probabilities(model, later, lr=DYNAMIC_RATE)
    static = stream_log_probabilities(model, text)
    cheating = _learned_first(model, text)
    apart = max(abs(each - 1) for each in sums)
    checks = {
        "probabilities of all words sum to 1": max(network, apart) < 1e-10,
        "without recurrence only the last word counts": memory == 0.0 and remembers > 0,
        "the first word is scored by the model as it came": float((scores[0] - static[0]).abs()) < 1e-12,
        "what comes later changes no score": torch.equal(scores[:29], again[:29]),
        "learning first would look better": float(cheating.mean()) > float(scores.mean()),
    }
    measured = {
        "sum of the network off by": network,
        "sum of the n-grams off by": apart,
        "nats a word": -float(scores.mean()),
    }
    return lab.judge(checks, measured, {"nats a word, scored after the update": -float(cheating.mean())})


def _learned_first(model: DecoderModel, text: Tensor) -> Tensor:
    """Score each word with the weights that have learned from it already: what must not be done."""
    model, found = copy.deepcopy(model), []
    for at in range(1, len(text)):
        pair = text[None, at - 1 : at + 1]
        train.fit(model, train.next_token_loss, [pair], _settings(1, DYNAMIC_RATE, None))
        found.append(stream_log_probabilities(model, text[at - 1 : at + 1]))
    return torch.cat(found)


@paper.claim(
    "Averaged with a Kneser-Ney 5-gram the network beats either alone",
    paper="Results on WSJ: RNN + KN5 against KN5, with weight 0.75 of the network",
    control="either model alone",
)
def mixes_with_ngrams(lab: Lab) -> Verdict:
    """Words of Shakespeare, 100 sigmoid units, three epochs; the weight of each is fitted on the validation part."""
    model, epochs, words = _network_and_words(lab)
    counts = KneserNey(words.training.tolist(), words.vocabulary.size, ORDER)
    scores: dict[str, list[Tensor]] = {"validation": [], "test": []}
    for part, both in scores.items():
        ids = getattr(words, part)
        with lab.threads(1):
            both += [stream_log_probabilities(model, ids), counts.log_probabilities(ids.tolist())]
    weights = mixture_weights(scores["validation"])
    network, ngrams = (_perplexity(words, each, "test") for each in scores["test"])
    mixed = _perplexity(words, interpolated(scores["test"], weights), "test")
    papers = _perplexity(words, interpolated(scores["test"], [0.75, 0.25]), "test")
    with lab.figure("perplexity", figsize=(6.4, 2.2)) as figure:
        _bars(figure, {"network": network, "5-grams": ngrams, "both": mixed}, "Perplexity on plays not read before")
    return lab.judge(
        checks={
            "at least 5% below the better one": mixed <= 0.95 * min(network, ngrams),
            "both have a say: weights above 0.2": min(weights) > 0.2,
        },
        measured={
            "perplexity of both": mixed,
            "weight of the network": weights[0],
            "perplexity of both, weight 0.75 as in the paper": papers,
            "validation perplexity of the network by epoch": epochs,
            "parameters": count_parameters(_network(words.vocabulary.size)),
            "test words": int(words.known["test"].sum()),
        },
        control={"perplexity, network": network, "perplexity, 5-grams": ngrams},
        note=f"{words.vocabulary.size:,} ids, of which one stands for {len(words.vocabulary.rare):,} rare words; test "
        "words that the training part never has are read but not scored. Truncated backpropagation over "
        f"{STEPS_BACK} words in {STREAMS} streams, where the paper has one word and one stream; the state begins at 0.",
    )


def _bars(figure: Any, values: dict[str, float], title: str) -> None:
    axes = figure.subplots()
    names = list(values)[::-1]
    colors = [COLORS[0], *[CONTROL] * (len(names) - 1)]
    axes.barh(names, [values[name] for name in names], color=colors)
    for index, name in enumerate(names):
        axes.text(values[name], index, f" {values[name]:.1f}", va="center")
    axes.set(title=title, xlim=(0, 1.15 * max(values.values())))


@paper.claim(
    "Going on to learn from the text it reads makes the network better on plays it has not read",
    paper="Section 2: dynamic models are updated once with each word of the test data, at rate 0.1",
    control="the static network; and the network after as many more updates on the training part",
)
def learns_from_what_it_reads(lab: Lab) -> Verdict:
    """The test part is of other plays; each chunk of five words is scored and then learned from, once."""
    model, _, words = _network_and_words(lab)
    count = lab.pick(smoke=60, small=15_000)
    text, known = words.test[:count], words.known["test"][:count]
    shorter = Words(words.vocabulary, words.training, words.validation, text, {"test": known})
    counts = KneserNey(words.training.tolist(), words.vocabulary.size, ORDER).log_probabilities(text.tolist())
    with lab.threads(1), lab.progress("dynamic evaluation", 2) as advance:
        static = stream_log_probabilities(model, text)
        dynamic = dynamic_log_probabilities(model, text, lr=DYNAMIC_RATE, length=CHUNK)
        advance(1)
        more, streams = copy.deepcopy(model), Streams(words.training[:count], batch=1, length=CHUNK)
        settings = _settings(len(streams), CHUNK * DYNAMIC_RATE, None)  # fit takes the mean of the chunk, not its sum
        train.fit(more, streams.loss, streams, settings)
        further = stream_log_probabilities(more, text)
        advance(1)
    both = [0.5, 0.5]
    found = {
        "static": _perplexity(shorter, static, "test"),
        "more of the training text": _perplexity(shorter, further, "test"),
        "dynamic": _perplexity(shorter, dynamic, "test"),
        "static + 5-grams": _perplexity(shorter, interpolated([static, counts], both), "test"),
        "dynamic + 5-grams": _perplexity(shorter, interpolated([dynamic, counts], both), "test"),
    }
    with lab.figure("dynamic", figsize=(6.4, 2.6)) as figure:
        _bars(figure, found, "Perplexity on plays not read before")
    return lab.judge(
        checks={
            "dynamic at least 5% below static": found["dynamic"] <= 0.95 * found["static"],
            "more training is no such help: less than half of it": (
                found["static"] - found["more of the training text"] < 0.5 * (found["static"] - found["dynamic"])
            ),
            "and so in the mixture with 5-grams": found["dynamic + 5-grams"] < found["static + 5-grams"],
        },
        measured={
            "perplexity, dynamic": found["dynamic"],
            "perplexity, dynamic + 5-grams": found["dynamic + 5-grams"],
            "words": int(known.sum()),
        },
        control={
            "perplexity, static": found["static"],
            "perplexity, static + 5-grams": found["static + 5-grams"],
            "perplexity after more of the training text": found["more of the training text"],
        },
        note=f"Equal weights in the mixtures. Chunks of {CHUNK} words at the paper's rate of {DYNAMIC_RATE} a word. "
        "The control learns from the first plays of the training part as the other does from the test part, and so "
        "draws near to those instead.",
    )
