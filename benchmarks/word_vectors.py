"""Skip-gram with negative sampling beside gensim, one thread each: words a second, and the analogies both answer."""

import copy
import time
from collections.abc import Iterator

import torch

from benchmarks.measure import Row, compare
from paperworks import train
from paperworks.data.text.word_contexts import WordContexts, WordVocabulary
from paperworks.models.classic.word_vectors import WordVectors, analogy_accuracy, word_vector_loss
from paperworks.testbeds.relations import RelationCorpus, question_ids

DIM, WINDOW, NEGATIVES, EPOCHS, RATE = 100, 5, 5, 6, 0.025
CORPUS = RelationCorpus(topic=60, usage=200, common=200, length=20, sentences=15_000)


def run() -> Iterator[Row]:
    from gensim.models import Word2Vec

    sentences = CORPUS.draw(seed=0)
    vocabulary = WordVocabulary.of(sentences, min_count=1)
    tokens, places = vocabulary.encode(sentences)
    batches = WordContexts(tokens, places, vocabulary.counts, window=WINDOW, noise=16, rows=32, span=32)
    steps = EPOCHS * len(batches)
    settings = train.Settings(
        steps=steps, lr=RATE, schedule="linear", warmup=0, min_lr=0, optimizer=train.SGD(), clip=None, save_every=None,
        log_every=steps, progress=False,
    )  # fmt: skip
    spec = WordVectors(vocab_size=len(vocabulary), dim=DIM, negatives=NEGATIVES, sparse=True)
    trained: dict[str, torch.Tensor] = {}
    # on a shared machine the processor's time says more than the clock
    busy: dict[str, list[float]] = {"ours": [], "peer": []}

    def ours() -> None:
        began = time.process_time()
        torch.manual_seed(0)
        model = spec.build()
        train.fit(model, word_vector_loss, batches, settings)
        trained["ours"] = model.input.weight.detach()
        busy["ours"].append(time.process_time() - began)

    untrained = Word2Vec(
        vector_size=DIM, window=WINDOW, min_count=1, workers=1, sg=1, negative=NEGATIVES, sample=0, alpha=RATE, seed=0
    )
    untrained.build_vocab(sentences)

    def theirs() -> None:
        began = time.process_time()
        peer = copy.deepcopy(untrained)  # its init_weights keeps the vectors it has
        peer.train(sentences, total_examples=len(sentences), epochs=EPOCHS)
        trained["peer"] = torch.stack([torch.from_numpy(peer.wv[word].copy()) for word in vocabulary.words])
        busy["peer"].append(time.process_time() - began)

    row = compare("skip-gram, negative sampling (peer: gensim)", ours, theirs, bar=1.0, blocks=3)
    questions = question_ids(CORPUS.questions(), vocabulary.index)
    row.details = {
        "ours_words_per_second": EPOCHS * len(tokens) / min(row.ours),
        "peer_words_per_second": EPOCHS * len(tokens) / min(row.peer),
        "ours_words_per_processor_second": EPOCHS * len(tokens) / min(busy["ours"]),
        "peer_words_per_processor_second": EPOCHS * len(tokens) / min(busy["peer"]),
        "ours_analogies": analogy_accuracy(trained["ours"], questions),
        "peer_analogies": analogy_accuracy(trained["peer"], questions),
        "vocabulary": float(len(vocabulary)),
    }
    yield row
