"""Word vectors: block losses against autograd, the plain equation of each pair, and gensim's own steps."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from paperworks import train
from paperworks.data.text.word_contexts import WordContexts
from paperworks.models.classic.huffman import huffman_paths
from paperworks.models.classic.word_vectors import (
    WordVectors,
    analogy_accuracy,
    negative_sampling_loss,
    pair_scores_loss,
    word_vector_loss,
)
from paperworks.nn import Spec

COUNTS = [40, 20, 11, 7, 5, 2, 2, 1]


def model_of(dtype=torch.float64, dim=6, **fields):
    model = WordVectors(vocab_size=8, dim=dim, **fields).build(COUNTS).to(dtype)
    for table in (model.input, model.output):
        torch.nn.init.normal_(table.weight, std=0.5)
    return model


def batch_of(noise=4, **options):
    draws = torch.Generator().manual_seed(3)
    tokens = torch.randint(8, (37,), generator=draws)
    sentences = torch.arange(37) // 9
    return next(iter(WordContexts(tokens, sentences, COUNTS, window=2, noise=noise, rows=3, span=5, **options)))


# --- the tree


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_codes_are_prefix_free_and_within_a_bit_of_the_entropy(counts):
    paths = huffman_paths(counts)
    codes = [paths.code(word) for word in range(len(counts))]
    assert not any(a != b and b.startswith(a) for a, b in product(codes, codes))
    assert len(set(codes)) == len(codes)
    assert sum(2.0 ** -len(code) for code in codes) == 1.0  # Kraft: no leaf is left unused
    shares = [count / sum(counts) for count in counts]
    entropy = -sum(share * math.log2(share) for share in shares)
    length = sum(share * len(code) for share, code in zip(shares, codes, strict=True))
    assert entropy - 1e-9 <= length < entropy + 1


def test_probabilities_of_the_tree_sum_to_one_and_are_products_along_the_path():
    model = model_of(output="softmax-tree")
    hidden = torch.randn(5, 6, dtype=torch.float64)
    logs = model.log_probabilities(hidden)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    paths = huffman_paths(COUNTS)
    for word in range(8):
        probability = 1.0
        for node, bit in zip(paths.nodes[word], paths.code(word), strict=False):
            score = hidden[0] @ model.output.weight[node]
            probability *= torch.sigmoid(-score if bit == "1" else score)
        torch.testing.assert_close(logs[0, word].exp(), probability)


@pytest.mark.parametrize("counts", [[3], [1, 0]])
def test_a_tree_needs_two_words_that_occur(counts):
    with pytest.raises(ValueError, match=r"two words|must occur"):
        huffman_paths(counts)


# --- block losses


def test_the_closed_form_equals_autograd_in_value_and_gradients():
    left, right = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    times, yes = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    scores = left @ right.transpose(1, 2)
    plain = (times * functional.softplus(scores) - yes * scores).sum()
    torch.testing.assert_close(pair_scores_loss(left, right, times, yes), plain)
    expected = torch.autograd.grad(3 * plain, (left, right))
    found = torch.autograd.grad(3 * pair_scores_loss(left, right, times, yes), (left, right))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda a, b: pair_scores_loss(a, b, times, yes), (left, right))


def test_scores_far_out_neither_overflow_nor_lose_the_loss():
    left = torch.tensor([[[1000.0], [-1000.0]]], requires_grad=True)
    loss = pair_scores_loss(left, torch.ones(1, 1, 1), torch.ones(1, 2, 1), torch.ones(1, 2, 1))
    assert loss.item() == pytest.approx(80.0)
    loss.backward()
    assert left.grad.flatten().tolist() == pytest.approx([0.0, -1.0])


def naive(model, batch, window=2):
    """The sum over pairs (skip-gram) or centres (CBOW), straight from the equations."""
    spec, total = model.spec, 0.0
    wi, wo = model.input.weight, model.output.weight
    noise = batch.get("noise")
    for row, words in enumerate(batch["words"]):
        for i, near in enumerate(batch["near"][row]):
            centre, contexts = words[i + window], words[near]
            if not len(contexts):
                continue
            if spec.architecture == "cbow":
                hidden = wi[contexts].sum(0) if spec.combine == "sum" else wi[contexts].mean(0)
                asked = [(hidden, centre)]
            elif spec.output == "softmax-tree":
                asked = [(wi[context], centre) for context in contexts]
            else:
                asked = [(wi[centre], context) for context in contexts]
            for hidden, target in asked:
                if spec.output == "softmax-tree":
                    total = total - _log_probability(model, hidden, int(target))
                    continue
                total = total - functional.logsigmoid(hidden @ wo[target])
                if noise is not None and spec.negatives:
                    against = [functional.softplus(hidden @ wo[n]) for n in noise[row] if n != target]
                    total = total + spec.negatives / noise.shape[1] * sum(against)
    return total


def _log_probability(model, hidden, word):
    paths, total = huffman_paths(COUNTS), 0.0
    for node, bit in zip(paths.nodes[word], paths.code(word), strict=False):
        score = hidden @ model.output.weight[node]
        total = total + functional.logsigmoid(-score if bit == "1" else score)
    return total


VARIANTS = [
    {"architecture": architecture, "output": output, "combine": combine, "negatives": negatives}
    for architecture, output, combine, negatives in (
        ("skip-gram", "negative sampling", "mean", 5),
        ("skip-gram", "negative sampling", "mean", 0),
        ("skip-gram", "softmax-tree", "mean", 5),
        ("cbow", "negative sampling", "mean", 3),
        ("cbow", "negative sampling", "sum", 3),
        ("cbow", "softmax-tree", "mean", 5),
        ("cbow", "softmax-tree", "sum", 5),
    )
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_block_is_the_sum_of_its_pairs_with_the_same_gradients(fields, sparse):
    model, batch = model_of(**fields, sparse=sparse), batch_of()
    loss = word_vector_loss(model, batch)
    loss.backward()
    found = [p.grad.to_dense() if sparse else p.grad for p in model.parameters()]
    expected = naive(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, list(model.parameters()))))


def test_a_sparse_gradient_has_each_row_once_and_in_order():
    model, batch = model_of(sparse=True), batch_of()
    word_vector_loss(model, batch).backward()
    for parameter in model.parameters():
        rows = parameter.grad._indices()[0]
        assert (rows.diff() > 0).all()


def test_the_programs_cbow_goes_forward_as_the_mean_and_backward_as_the_sum():
    torch.manual_seed(1)
    ours = model_of(architecture="cbow", output="softmax-tree", combine="program")
    mean = model_of(architecture="cbow", output="softmax-tree", combine="mean")
    mean.load_state_dict(ours.state_dict())
    batch = batch_of(shrink=False)
    batch["near"][:] = batch["near"] & (batch["near"].sum(-1, keepdim=True) == 4)  # centres with four contexts
    losses = [word_vector_loss(model, batch) for model in (ours, mean)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.input.weight.grad, 4 * mean.input.weight.grad)
    torch.testing.assert_close(ours.output.weight.grad, mean.output.weight.grad)


def test_the_loss_of_pairs_is_the_papers_equation_and_its_gradient_sigmoid_minus_label():
    word, context = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise = torch.randn(4, 3, 6, dtype=torch.float64)
    losses = negative_sampling_loss(word, context, noise)
    for p in range(4):
        plain = -torch.log(torch.sigmoid(context[p] @ word[p]))
        plain = plain - sum(torch.log(torch.sigmoid(-noise[p, n] @ word[p])) for n in range(3))
        torch.testing.assert_close(losses[p], plain)
    losses.sum().backward()
    torch.testing.assert_close(context.grad, (torch.sigmoid((word * context).sum(-1)) - 1)[:, None] * word)
    only = torch.tensor([[True, False, False]]).expand(4, 3)
    torch.testing.assert_close(
        negative_sampling_loss(word, context, noise, only), negative_sampling_loss(word, context, noise[:, :1])
    )


# --- gensim


def gensims_steps(architecture, output):
    """Let gensim take its steps over one sentence, and ours the same, pair by pair; return both tables of each."""
    import numpy as np
    from gensim.models import Word2Vec

    rate, window, dim = 0.05, 2, 6
    names = [f"w{n}" for n in range(8)]
    sentence = [0, 3, 1, 5, 2, 0, 7]
    tree = output == "softmax-tree"
    peer = Word2Vec(vector_size=dim, window=window, min_count=1, workers=1, sample=0, alpha=rate, min_alpha=rate,
                    sg=int(architecture == "skip-gram"), hs=int(tree), negative=0 if tree else 1, shrink_windows=False,
                    cbow_mean=1)  # fmt: skip
    peer.build_vocab_from_freq(dict(zip(names, COUNTS, strict=True)))
    order = [peer.wv.key_to_index[name] for name in names]
    ours = model_of(architecture=architecture, output=output, negatives=1, combine="program")
    started = ours.input.weight.detach().clone()
    peer.wv.vectors[order] = ours.input.weight.detach().numpy().astype(np.float32)
    table = "syn1" if tree else "syn1neg"
    getattr(peer, table)[:] = np.random.default_rng(0).normal(size=getattr(peer, table).shape, scale=0.5)
    if tree:  # gensim counts inner nodes from the leaves too, and ties may have been broken otherwise: take its tree
        for word, place in enumerate(order):
            points = torch.tensor([int(point) for point in peer.wv.get_vecattr(names[word], "point")])
            code = torch.tensor([bool(bit) for bit in peer.wv.get_vecattr(names[word], "code")])
            assert place == order[word]
            ours.tree_nodes = _widened(ours.tree_nodes, len(code))
            ours.tree_codes, ours.tree_passed = (
                _widened(each, len(code)) for each in (ours.tree_codes, ours.tree_passed)
            )
            ours.tree_passed[word] = False
            ours.tree_nodes[word, : len(code)], ours.tree_codes[word, : len(code)] = points[: len(code)], code
            ours.tree_passed[word, : len(code)] = True
        ours.output.weight.data = torch.tensor(peer.syn1[:7], dtype=torch.float64)
    else:
        peer.cum_table[:] = peer.cum_table[-1]  # every noise word drawn is gensim's word 0
        ours.output.weight.data = torch.tensor(peer.syn1neg[order], dtype=torch.float64)
    noise = torch.tensor([[order.index(0)]])
    peer.train([[names[word] for word in sentence]], total_examples=1, epochs=1, start_alpha=rate, end_alpha=rate)
    optimizer = torch.optim.SGD(ours.parameters(), lr=rate)
    for batch in _in_gensims_order(architecture, tree, sentence, window):
        optimizer.zero_grad()
        word_vector_loss(ours, batch | {"noise": noise}).backward()
        optimizer.step()
    assert (ours.input.weight - started).abs().max() > 0.04
    there = [peer.wv.vectors[order], peer.syn1[:7] if tree else peer.syn1neg[order]]
    return [torch.tensor(each, dtype=torch.float64) for each in there], [p.detach() for p in ours.parameters()]


def _widened(table, width):
    return functional.pad(table, (0, max(0, width - table.shape[1])))


def _in_gensims_order(architecture, tree, sentence, window):
    """One batch for each of gensim's steps: a pair, or all contexts of a centre."""
    words = functional.pad(torch.tensor([sentence]), (window, window))
    for i in range(len(sentence)):
        around = [j for j in range(max(0, i - window), min(len(sentence), i + window + 1)) if j != i]
        for some in [around] if architecture == "cbow" else [[j] for j in around]:
            near = torch.zeros(1, len(sentence), words.shape[1], dtype=torch.bool)
            for j in some:
                if architecture == "skip-gram" and not tree:  # there the context predicts the centre
                    near[0, j, i + window] = True
                else:
                    near[0, i, j + window] = True
            yield {"words": words, "near": near}


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
@pytest.mark.parametrize("output", ["softmax-tree", "negative sampling"])
def test_a_sentences_steps_equal_gensims(architecture, output):
    torch.manual_seed(0)
    there, here = gensims_steps(architecture, output)
    # gensim reads its sigmoid from a table 0.012 apart, rounding down: off by 0.0015 on average, by 0.003 at most. A
    # row takes up to 24 steps of 0.05 * that * |v|, with |v| up to 2.
    for ours, peers in zip(here, there, strict=True):
        torch.testing.assert_close(ours, peers, atol=4e-3, rtol=0)


@pytest.mark.parity
def test_code_lengths_equal_gensims():
    from gensim.models import Word2Vec

    counts = [97, 53, 41, 30, 19, 13, 11, 7, 5, 3, 2, 1]
    peer = Word2Vec(vector_size=2, min_count=1, hs=1, negative=0)
    peer.build_vocab_from_freq({f"w{n}": count for n, count in enumerate(counts)})
    lengths = [len(peer.wv.get_vecattr(f"w{n}", "code")) for n in range(len(counts))]
    assert huffman_paths(counts).lengths.tolist() == lengths


# --- the model


def test_it_learns_through_the_one_loop_with_dense_and_sparse_gradients_alike():
    tokens = torch.randint(8, (400,), generator=torch.Generator().manual_seed(0))
    batches = WordContexts(tokens, torch.zeros_like(tokens), COUNTS, window=2, noise=8, rows=2, span=16)
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = WordVectors(vocab_size=8, dim=4, sparse=sparse).build()
        plan = train.Settings(steps=26, lr=0.05, schedule="linear", warmup=0, min_lr=0, optimizer=train.SGD(), clip=1.0,
                              save_every=None, progress=False)  # fmt: skip
        report = train.fit(model, word_vector_loss, batches, plan)
        weights.append(model.input.weight.detach())
    torch.testing.assert_close(*weights)
    assert report.steps == 26


def test_analogies_and_neighbours_leave_out_the_words_asked():
    model = WordVectors(vocab_size=6, dim=3).build()
    vectors = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0.2, 0, 1], [0.2, 1, 1], [-1, 0, 0], [0, -1, 0]])
    with torch.no_grad():
        model.input.weight.copy_(vectors * torch.tensor([[1.0], [5], [2], [9], [1], [3]]))  # lengths do not matter
    model.words = ["man", "woman", "king", "queen", "stone", "sand"]
    assert model.analogy("man", "woman", "king")[0][0] == "queen"
    assert model.nearest("king", 1)[0][0] == "queen"
    assert model.nearest(0, 9)[0][0] == "woman"
    assert len(model.nearest("king", 9)) == 5
    assert model.nearest(torch.tensor([-1.0, 0, 0]), 1) == [("stone", pytest.approx(1.0))]
    assert analogy_accuracy(model.input.weight, torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])) == 0.5
    # without the rule the nearest to b - a + c would often be c itself
    assert analogy_accuracy(model.input.weight, torch.tensor([[0, 0, 2, 2]])) == 0.0


def test_the_spec_round_trips_and_begins_as_published():
    spec = WordVectors(vocab_size=50, dim=10, architecture="cbow", output="softmax-tree")
    assert Spec.from_dict(spec.to_dict()) == spec
    model = spec.build(list(range(1, 51)))
    assert model.output.weight.shape == (49, 10)
    assert not model.output.weight.any()
    assert 0.045 < model.input.weight.abs().max() <= 0.05
    assert model(torch.tensor([[3, 4]])).shape == (1, 2, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WordVectors(vocab_size=1, dim=3), "at least 2"),
        (lambda: WordVectors(vocab_size=3, dim=0), "at least 1"),
        (lambda: WordVectors(vocab_size=3, dim=2, negatives=-1), "0 or more"),
        (lambda: WordVectors(vocab_size=3, dim=2, output="softmax"), "one of"),
        (lambda: WordVectors(vocab_size=3, dim=2, output="softmax-tree").build(), "how often"),
        (lambda: WordVectors(vocab_size=3, dim=2, output="softmax-tree").build([1, 2]), "2 counts"),
        (lambda: word_vector_loss(model_of(), batch_of(noise=0)), "needs noise words"),
        (lambda: model_of().nearest("king"), "set model.words"),
        (lambda: model_of().nearest(8), "outside the vocabulary of 8"),
        (lambda: model_of().log_probabilities(torch.zeros(1, 6)), "only a softmax-tree"),
        (lambda: analogy_accuracy(torch.zeros(3, 2), torch.zeros(2, 3)), "rows of four"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_word_that_is_not_there_is_named():
    model = model_of()
    model.words = list("abcdefgh")
    with pytest.raises(ValueError, match="'z' is not among the 8"):
        model.analogy("a", "z", "b")
