"""The recurrent network language model: mixed with n-grams it beats both, and it learns on from the text it reads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from paperworks import train
from paperworks.data.text.texts import load_text
from paperworks.data.text.words import Vocabulary, split_words
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import Block, Decoder, DecoderModel, NoResidual
from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.models.surgery.interpolation import interpolated, mixture_weights
from paperworks.nn import Elman
from paperworks.nn.identity_norm import NoNorm
from paperworks.testbeds.training import fit
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
    equation=r"s(t) = \sigma(U w(t) + W s(t-1)), \; y(t) = \operatorname{softmax}(V s(t))",
    usage="""
import torch
from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.models.surgery.interpolation import interpolated, mixture_weights

text = (torch.arange(3000) % 7 * 3 + torch.arange(3000) % 2).tolist()  # ids of words
models = [KneserNey(text[:2000], vocab_size=22, order=order) for order in (2, 5)]  # or a network's log probabilities
scores = [model.log_probabilities(text[2000:]) for model in models]
weights = mixture_weights(scores)
print("weights:", weights, "nats a word:", -float(interpolated(scores, weights).mean()))
""",
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


SGD: dict[str, Any] = {"schedule": "constant", "warmup": 0, "optimizer": train.SGD()}


def _fitted(lab: Lab, words: Words, epochs: int, seed: int) -> DecoderModel:
    """Train by plain gradient descent; once an epoch gains less than 1% of perplexity, halve the rate every epoch."""
    model = _network(words.vocabulary.size).build()
    streams = Streams(words.training, batch=STREAMS, length=STEPS_BACK)
    rate, halving, perplexities = RATE, False, list[float]()
    with lab.threads(1):
        for _ in range(epochs):
            fit(model, streams.loss, streams, steps=len(streams), lr=rate, seed=seed, clip=1.0, **SGD)
            scores = stream_log_probabilities(model, words.validation)
            perplexities.append(_perplexity(words, scores, "validation"))
            halving = halving or (len(perplexities) > 1 and perplexities[-1] > 0.99 * perplexities[-2])
            rate = rate / 2 if halving else rate
    return model.eval()


_FITTED: dict[tuple[str, int], DecoderModel] = {}


def _network_and_words(lab: Lab, seed: int) -> tuple[DecoderModel, Words]:
    """Both claims ask the same network; it is trained for the first of them."""
    words = _words(lab.pick(smoke=3_000, small=None))
    if (lab.scale, seed) not in _FITTED:
        _FITTED[lab.scale, seed] = _fitted(lab, words, lab.pick(smoke=1, small=2), seed)
    return _FITTED[lab.scale, seed], words


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
    """Scores of words by the weights that have learned from them already: what must not be done."""
    model, found = copy.deepcopy(model), []
    for at in range(1, len(text)):
        pair = text[None, at - 1 : at + 1]
        fit(model, train.next_token_loss, [pair], steps=1, lr=DYNAMIC_RATE, clip=None, **SGD)
        found.append(stream_log_probabilities(model, text[at - 1 : at + 1]))
    return torch.cat(found)


@cache
def _counts(scale: str, order: int) -> KneserNey:
    words = _words(3_000 if scale == "smoke" else None)
    return KneserNey(words.training.tolist(), words.vocabulary.size, order)


@paper.claim(
    "Averaged with a Kneser-Ney 5-gram the network beats either alone",
    paper="Results on WSJ: RNN + KN5 against KN5, with weight 0.75 of the network",
    control="either model alone",
    reach="real",
)
def mixes_with_ngrams(lab: Lab) -> Verdict:
    """Words of Shakespeare, 100 sigmoid units, two epochs; the weight of each is fitted on the validation part."""

    @cache
    def perplexities(seed: int) -> dict[str, dict[str, float]]:
        model, words = _network_and_words(lab, seed)
        counts = _counts(lab.scale, ORDER)
        scores: dict[str, list[Tensor]] = {}
        for part in ("validation", "test"):
            ids = getattr(words, part)
            with lab.threads(1):
                scores[part] = [stream_log_probabilities(model, ids), counts.log_probabilities(ids.tolist())]
        weights = mixture_weights(scores["validation"])
        mixed = interpolated(scores["test"], weights)
        found = {"both": mixed, "network": scores["test"][0], "5-grams": scores["test"][1]}
        shares = {"both": 1.0, "network": weights[0], "5-grams": weights[1]}
        return {
            name: {"perplexity": _perplexity(words, logs, "test"), "weight in the mixture": shares[name]}
            for name, logs in found.items()
        }

    def arm(name: str) -> Callable[[int], dict[str, float]]:
        return lambda seed: perplexities(seed)[name]

    words = _words(lab.pick(smoke=3_000, small=None))
    verdict = lab.compare(
        arms={name: arm(name) for name in ("both", "5-grams", "network")},
        main=Beats("both", "5-grams", on="perplexity", by_ratio=0.05, lower=True),
        also=[
            Beats("both", "network", on="perplexity", by_ratio=0.05, lower=True),
            AtLeast("network", 0.2, on="weight in the mixture"),
            AtLeast("5-grams", 0.2, on="weight in the mixture"),
        ],
        seeds=2,
        measured={"test words": int(words.known["test"].sum())},
        note=f"{words.vocabulary.size:,} ids, of which one stands for {len(words.vocabulary.rare):,} rare words; test "
        "words that the training part never has are read but not scored. Truncated backpropagation over "
        f"{STEPS_BACK} words in {STREAMS} streams, where the paper has one word and one stream; the state begins at 0.",
    )
    lab.points("perplexity", title="Perplexity on plays not read before")
    return verdict


@paper.claim(
    "Going on to learn from the text it reads makes the network better on plays it has not read",
    paper="Section 2: dynamic models are updated once with each word of the test data, at rate 0.1",
    control="the static network; and the network after as many more updates on the training part",
    reach="real",
)
def learns_from_what_it_reads(lab: Lab) -> Verdict:
    """The test part is of other plays; each chunk of five words is scored and then learned from, once."""
    count = lab.pick(smoke=60, small=12_000)

    def arm(scored: Callable[[DecoderModel, Words], Tensor]) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model, words = _network_and_words(lab, seed)
            text, known = words.test[:count], words.known["test"][:count]
            shorter = Words(words.vocabulary, words.training, words.validation, text, {"test": known})
            with lab.threads(1):
                logs = scored(model, shorter)
            both = interpolated([logs, _counts(lab.scale, ORDER).log_probabilities(text.tolist())], [0.5, 0.5])
            return {
                "perplexity": _perplexity(shorter, logs, "test"),
                "perplexity with 5-grams": _perplexity(shorter, both, "test"),
            }

        return measures

    def dynamic(model: DecoderModel, words: Words) -> Tensor:
        return dynamic_log_probabilities(model, words.test, lr=DYNAMIC_RATE, length=CHUNK)

    def static(model: DecoderModel, words: Words) -> Tensor:
        return stream_log_probabilities(model, words.test)

    def further(model: DecoderModel, words: Words) -> Tensor:
        more, streams = copy.deepcopy(model), Streams(words.training[:count], batch=1, length=CHUNK)
        rate = CHUNK * DYNAMIC_RATE  # fit takes the mean of the chunk, not its sum
        fit(more, streams.loss, streams, steps=len(streams), lr=rate, clip=None, **SGD)
        return stream_log_probabilities(more, words.test)

    verdict = lab.compare(
        arms={"dynamic": arm(dynamic), "static": arm(static), "more training": arm(further)},
        main=Beats("dynamic", "static", on="perplexity", by_ratio=0.05, lower=True),
        also=[
            Beats("dynamic", "more training", on="perplexity", by_ratio=0.05, lower=True),
            Beats("dynamic", "static", on="perplexity with 5-grams", lower=True),
        ],
        seeds=2,
        note=f"Equal weights in the mixtures. Chunks of {CHUNK} words at the paper's rate of {DYNAMIC_RATE} a word. "
        "The control learns from the first plays of the training part as the other does from the test part, and so "
        "draws near to those instead.",
    )
    lab.points("perplexity", name="dynamic", title="Perplexity on plays not read before")
    return verdict
