import pytest
import torch

from paperworks.interpret.circuits.acdc import Circuit, acdc, divergence, evaluate, recovery_auc
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.models import Block, Decoder, Parallel
from paperworks.nn import Attention, LearnedPositions, NoNorm
from tests.interpret.circuits.test_patching import CLEAN, CORRUPTED
from tests.interpret.lenses.test_logit_lens import gpt2_like, llama_like

PLANTED = ("embed->0.0.v", "0.0->1.0.k", "embed->1.0.q", "embed->1.0.v", "1.0->logits")


def planted(noise=0.08):
    """Two layers of two heads with an induction circuit written into heads 0.0 and 1.0, the others low-rank noise."""
    vocab, time, size = 12, 18, 18
    block = Block(norm=NoNorm(), mixer=Attention(heads=2, head_dim=size))
    model = Decoder(
        vocab_size=vocab,
        dim=3 * vocab + time,
        depth=2,
        block=block,
        norm=None,
        position=LearnedPositions(length=time),
    ).build()
    token, before, answer = (slice(start, start + vocab) for start in (0, vocab, 2 * vocab))
    place = slice(3 * vocab, 3 * vocab + time)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embedding.weight[:, token] = torch.eye(vocab)
        model.position.weight[:, place] = torch.eye(time)
        model.unembedding.weight[:, answer] = 10 * torch.eye(vocab)
        one, two = (block.mixer for block in model.blocks)
        for mixer in (one, two):
            for linear in (mixer.query, mixer.key, mixer.value):
                linear.weight[size:] = noise * (
                    torch.randn(size, 2, generator=generator) @ torch.randn(2, 3 * vocab + time, generator=generator)
                )
            mixer.output.weight[:, size:] = noise * (
                torch.randn(3 * vocab + time, 2, generator=generator) @ torch.randn(2, size, generator=generator)
            )
        one.query.weight[:time, place] = 8 * size**0.5 * torch.eye(time)
        one.key.weight[1:time, place] = torch.eye(time)[:-1]
        one.value.weight[:vocab, token] = torch.eye(vocab)
        one.output.weight[before, :vocab] = torch.eye(vocab)
        two.query.weight[:vocab, token] = 8 * size**0.5 * torch.eye(vocab)
        two.key.weight[:vocab, before] = torch.eye(vocab)
        two.value.weight[:vocab, token] = torch.eye(vocab)
        two.output.weight[answer, :vocab] = torch.eye(vocab)
    return model.eval()


def sequences(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [1 + torch.randperm(11, generator=generator)[:8] for _ in range(6)]
    return torch.stack([torch.cat((torch.tensor([0]), row, row)) for row in rows])


TOKENS = sequences(1)
# repeats nothing: corrupted queries and keys of a repeated sequence would together look at the right place
OTHERS = torch.cat((sequences(2)[:, :9], sequences(3)[:, 9:]), 1)
SECOND_COPY = torch.zeros_like(TOKENS, dtype=torch.bool).index_fill(1, torch.arange(9, 16), True)


@pytest.mark.parametrize("make", [planted, llama_like, gpt2_like])
def test_all_edges_on_is_the_model_and_all_off_is_the_corrupted_run(make):
    model = make()
    clean, corrupted = (TOKENS, OTHERS) if make is planted else (CLEAN, CORRUPTED)
    graph = EdgeGraph(model)
    outputs = graph.outputs(corrupted)
    with torch.no_grad():
        on = graph.run(clean, graph.possible, outputs)
        off = graph.run(clean, torch.zeros_like(graph.possible), outputs)
        assert (on - model(clean)).abs().max() < 1e-4
        assert (off - model(corrupted)).abs().max() < 1e-4
    assert not any(module._forward_hooks for module in model.modules())


def test_the_graph_of_two_layers_of_two_heads_has_29_edges():
    graph = EdgeGraph(planted())
    assert len(graph) == 29
    assert graph.senders == ["embed", "0.0", "0.1", "1.0", "1.1"]
    assert graph.named(graph.edges(*PLANTED)) == [
        "embed->0.0.v",
        "embed->1.0.q",
        "0.0->1.0.k",
        "embed->1.0.v",
        "1.0->logits",
    ]


def test_shared_keys_are_one_receiver_and_feedforward_layers_are_nodes():
    graph = EdgeGraph(llama_like())
    assert "1.1.k" in graph.receivers
    assert "1.2.k" not in graph.receivers
    assert graph.node("1.1.k") == ["1.2", "1.3"]
    assert graph.node("1.mlp") == ["1.mlp"]
    row = graph.receivers.index("1.mlp")
    assert graph.possible[row, graph.senders.index("1.3")]
    assert not graph.possible[row, graph.senders.index("1.mlp")]


def test_one_edge_off_equals_a_forward_pass_written_out_by_hand():
    model = planted()
    graph = EdgeGraph(model)
    with torch.no_grad():
        found = graph.run(TOKENS, graph.possible & ~graph.edges("0.0->1.0.k"), graph.outputs(OTHERS))
        x = model.embedding(TOKENS) + model.position.weight[: TOKENS.shape[1]]
        y = model.embedding(OTHERS) + model.position.weight[: TOKENS.shape[1]]

        def attention(mixer, head, query, key, value):
            part = slice(18 * head, 18 * head + 18)
            q, k, v = (
                inputs @ linear.weight[part].T
                for inputs, linear in ((query, mixer.query), (key, mixer.key), (value, mixer.value))
            )
            mask = torch.ones(17, 17, dtype=torch.bool).triu(1)
            scores = (q @ k.mT / 18**0.5).masked_fill(mask, -torch.inf)
            return scores.softmax(-1) @ v @ mixer.output.weight[:, part].T

        one, two = model.blocks[0].mixer, model.blocks[1].mixer
        first, second = attention(one, 0, x, x, x), attention(one, 1, x, x, x)
        corrupted = attention(one, 0, y, y, y)
        stream = x + first + second
        key = x + corrupted + second
        final = stream + attention(two, 0, stream, key, stream) + attention(two, 1, stream, stream, stream)
        expected = final @ model.unembedding.weight.T
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("threshold", [0.01, 0.1, 1.0])
def test_a_planted_circuit_is_recovered_exactly(threshold):
    graph = EdgeGraph(planted())
    found = acdc(graph, TOKENS, OTHERS, threshold, positions=SECOND_COPY)
    truth = graph.edges(*PLANTED)
    assert found.against(truth) == (1.0, 1.0)
    assert found.divergence < threshold
    again = evaluate(graph, found.edges, TOKENS, OTHERS, SECOND_COPY)
    assert again.divergence == pytest.approx(found.divergence, abs=1e-9)


def test_random_edges_are_no_circuit():
    graph = EdgeGraph(planted())
    truth = graph.edges(*PLANTED)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.rand(graph.possible.shape, generator=generator).masked_fill(~graph.possible, -1).flatten()
        chosen = torch.zeros(order.shape, dtype=torch.bool).index_fill(0, order.topk(5).indices, True)
        circuit = evaluate(graph, chosen.view_as(graph.possible), TOKENS, OTHERS, SECOND_COPY)
        assert min(circuit.against(truth)) < 0.9
        assert circuit.divergence > 1


def test_the_threshold_goes_from_everything_to_nothing():
    graph = EdgeGraph(planted())
    everything = acdc(graph, TOKENS, OTHERS, -torch.inf)
    assert torch.equal(everything.edges, graph.possible)
    assert everything.divergence == pytest.approx(0, abs=1e-9)
    nothing = acdc(graph, TOKENS, OTHERS, torch.inf)
    assert len(nothing) == 0
    with torch.no_grad():
        expected = divergence(graph.model(TOKENS), graph.model(OTHERS))
    assert nothing.divergence == pytest.approx(expected, rel=1e-5)


def test_nodes_that_nothing_reads_are_not_tried():
    graph = EdgeGraph(planted())
    tried = []
    acdc(graph, TOKENS, OTHERS, 0.1, positions=SECOND_COPY, on_each=lambda: tried.append(1))
    # logits 5, the three inputs of head 1.0 with 3 each, the three of head 0.0; heads 1.1 and 0.1 are dropped untried
    assert len(tried) == 5 + 9 + 3


def test_zero_ablation_puts_zeros_on_edges_that_are_off():
    graph = EdgeGraph(planted())
    nothing = acdc(graph, TOKENS, OTHERS, torch.inf, zero=True)
    uniform = torch.zeros(*TOKENS.shape, 12)
    with torch.no_grad():
        assert nothing.divergence == pytest.approx(divergence(graph.model(TOKENS), uniform), rel=1e-5)


def test_a_circuit_prints_as_a_tree():
    graph = EdgeGraph(planted())
    circuit = Circuit(graph, graph.edges(*PLANTED), 0.01)
    assert str(circuit).splitlines() == [
        "5 of 29 edges, KL 0.01 nats",
        "logits",
        "└─ 1.0",
        "   ├─ q reads",
        "   │  └─ embed",
        "   ├─ k reads",
        "   │  └─ 0.0",
        "   │     └─ v reads",
        "   │        └─ embed",
        "   └─ v reads",
        "      └─ embed",
    ]
    assert len(circuit) == 5


def test_a_circuit_draws_its_nodes_and_edges():
    from matplotlib.figure import Figure

    graph = EdgeGraph(planted())
    axes = Figure().subplots()
    Circuit(graph, graph.edges(*PLANTED), 0.01).draw(axes, truth=graph.edges(PLANTED[0]))
    texts = [text.get_text() for text in axes.texts]
    assert {"embed", "0.0", "0.1", "1.0", "1.1", "logits"} <= set(texts)
    assert texts.count("") == 5  # one arrow an edge


def test_the_area_under_the_curve_is_the_chance_of_a_right_order():
    graph = EdgeGraph(planted())
    truth = graph.edges(*PLANTED)
    assert recovery_auc(truth.float(), truth, graph) == 1.0
    assert recovery_auc(torch.zeros(truth.shape), truth, graph) == 0.5
    assert recovery_auc(-truth.float(), truth, graph) == 0.0
    with pytest.raises(ValueError, match="needs true and false edges"):
        recovery_auc(truth.float(), torch.zeros_like(truth), graph)


def test_wrong_input_is_refused_with_what_would_be_right():
    graph = EdgeGraph(planted())
    with pytest.raises(ValueError, match=r"unknown edge '0.0->1.0.x'; did you mean '0.0->1.0"):
        graph.edges("0.0->1.0.x")
    with pytest.raises(ValueError, match=r"is no edge: 1\.0 is computed after 0\.0\.q"):
        graph.edges("1.0->0.0.q")
    with pytest.raises(ValueError, match="edges must be bool"):
        graph.run(TOKENS, graph.possible.float(), graph.outputs(OTHERS))
    with pytest.raises(ValueError, match=r"from graph.outputs\(tokens\)"):
        graph.run(TOKENS, graph.possible, graph.outputs(OTHERS)[:, :3])
    with pytest.raises(ValueError, match="must have the same shape"):
        acdc(graph, TOKENS, OTHERS[:, :5], 0.1)
    with pytest.raises(ValueError, match="positions must mark some"):
        acdc(graph, TOKENS, OTHERS, 0.1, positions=SECOND_COPY & False)
    with pytest.raises(ValueError, match=r"edges are known for PreNorm\(\) blocks"):
        EdgeGraph(gpt2_like(Parallel()))
