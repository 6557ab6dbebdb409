import pytest
import torch

from paperworks.interpret.circuits.causal_scrubbing import (
    Meaning,
    Node,
    agreeing,
    attention_tree,
    evaluate,
    examine,
    scrub,
)
from tests.interpret.circuits.test_acdc import TOKENS, planted
from tests.interpret.circuits.test_circuits import attention_only
from tests.interpret.lenses.test_logit_lens import llama_like

BITS = torch.cartesian_prod(*[torch.tensor([0, 1])] * 4)  # all 16 rows of x1 x2 x3 x4


def xor_network():
    """y = x1 xor x2, by two parts; a third part reads x3 and is not used."""
    inputs = [Node(f"x{index + 1}", lambda data, index=index: data[:, index].double()) for index in range(4)]
    both = Node("both", lambda a, b: a * b, (inputs[0], inputs[1]))
    either = Node("either", lambda a, b: a + b - a * b, (inputs[0], inputs[1]))
    idle = Node("idle", lambda a: 0 * a, (inputs[2],))
    return Node("output", lambda both, either, idle: either - both + idle, (both, either, idle))


def bit(index):
    return lambda data: data[:, index]


def loss(output, data):
    return (output - (data[:, 0] ^ data[:, 1])).square()


def leaf(index):
    return Meaning(bit(index))


BOTH = Meaning(lambda data: data[:, 0] & data[:, 1], {"x1": leaf(0), "x2": leaf(1)})
EITHER = Meaning(lambda data: data[:, 0] | data[:, 1], {"x1": leaf(0), "x2": leaf(1)})
XOR = lambda data: data[:, 0] ^ data[:, 1]  # noqa: E731


def test_the_right_hypothesis_recovers_everything():
    found = examine(xor_network(), Meaning(XOR, {"both": BOTH, "either": EITHER}), BITS, loss, draws=20)
    assert found.model == 0
    assert found.recovered == pytest.approx(1.0, abs=1e-12)


def test_a_dropped_feature_recovers_nothing():
    inputs = [Node(f"x{index + 1}", lambda data, index=index: data[:, index].double()) for index in range(2)]
    at_once = Node("output", lambda a, b: a + b - 2 * a * b, tuple(inputs))
    assert examine(at_once, Meaning(XOR, {"x1": leaf(0), "x2": leaf(1)}), BITS, loss).recovered == 1.0
    found = examine(at_once, Meaning(XOR, {"x1": leaf(0)}), BITS, loss, draws=400)
    # 6,400 draws of a coin: five standard errors are 0.031 of the error, twice that of the share recovered
    assert found.recovered == pytest.approx(0.0, abs=0.09)
    assert found.random == pytest.approx(0.5, abs=0.031)


def test_the_trivial_hypothesis_and_the_empty_one():
    everything = lambda data: data  # noqa: E731
    whole = Meaning(everything)
    leaves = {"x1": whole, "x2": whole}
    trivial = Meaning(
        everything,
        {"both": Meaning(everything, leaves), "either": Meaning(everything, leaves), "idle": Meaning(everything)},
    )
    assert examine(xor_network(), trivial, BITS, loss).recovered == 1.0
    empty = examine(xor_network(), Meaning(everything), BITS, loss, draws=400)
    assert empty.recovered == pytest.approx(0.0, abs=0.06)


def test_a_class_of_one_row_forces_identity():
    rows = torch.tensor([3, 3, 9])
    assert torch.equal(agreeing(torch.arange(16), rows, torch.Generator().manual_seed(0)), rows)


def test_draws_are_uniform_among_rows_that_agree():
    labels = torch.tensor([[0, 1], [5, 1], [0, 1], [5, 2], [0, 1]])
    drawn = agreeing(labels, torch.zeros(3000, dtype=torch.int64), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert counts[[0, 2, 4]].min() > 1000 - 130  # five standard errors of a third of 3,000


def test_a_node_that_is_read_twice_is_drawn_twice_and_unimportant_parents_share_one_draw():
    source = Node("x", lambda data: data[:, 0])
    first, second = Node("first", lambda x: x, (source,)), Node("second", lambda x: x, (source,))
    pair = Node("pair", lambda a, b: torch.stack((a, b)), (first, second))
    data = torch.arange(1000)[:, None]
    rows = torch.arange(1000)
    same = lambda data: 0 * data[:, 0]  # noqa: E731
    meant = Meaning(same, {"first": Meaning(same, {"x": Meaning(same)}), "second": Meaning(same, {"x": Meaning(same)})})
    one, two = scrub(pair, meant, data, rows, torch.Generator().manual_seed(0))
    assert (one == two).float().mean() < 0.02
    one, two = scrub(pair, Meaning(same), data, rows, torch.Generator().manual_seed(0))
    assert torch.equal(one, two)
    assert (one == rows).float().mean() < 0.02


@pytest.mark.parametrize("make", [planted, attention_only])
def test_a_tree_of_heads_computes_the_models_logits(make):
    model = make()
    with torch.no_grad():
        expected = model(TOKENS)[:, -2]
        assert (evaluate(attention_tree(model, -2), TOKENS) - expected).abs().max() < 1e-4


def test_an_induction_hypothesis_needs_its_previous_token_head():
    """Rows "0 X1 Y1 .. X3 Y3 Q" with Q one of the X; the answer is the Y behind it."""
    generator = torch.Generator().manual_seed(0)
    lists = [(1 + torch.randperm(5, generator=generator)[:3], 6 + torch.randperm(6, generator=generator)[:3])]
    lists += [(1 + torch.randperm(5, generator=generator)[:3], lists[0][1].roll(1)) for _ in range(3)]
    rows = [
        torch.cat((torch.tensor([0]), torch.stack((some, others), 1).flatten(), asked[None]))
        for some, _ in lists
        for _, others in lists[:2]
        for asked in some
    ]
    data = torch.stack(rows)
    keys, values, asked = (lambda data: data[:, 1:7:2]), (lambda data: data[:, 2:7:2]), (lambda data: data[:, 7])

    def behind(data):
        return values(data).gather(1, (keys(data) == data[:, 7:]).int().argmax(1, keepdim=True))[:, 0]

    def wrong(logits, data):
        return 1 - logits.softmax(-1).gather(1, behind(data)[:, None])[:, 0]

    writes = Meaning(keys, {"0.0.v": Meaning(keys, {"embed": Meaning(keys)})})

    def hypothesis(key_parents):
        reads = {
            "1.0.q": Meaning(asked, {"embed": Meaning(asked)}),
            "1.0.k": Meaning(keys, key_parents),
            "1.0.v": Meaning(values, {"embed": Meaning(values)}),
        }
        return Meaning(behind, {"1.0": Meaning(behind, reads)})

    tree = attention_tree(planted(noise=0.02))
    assert examine(tree, hypothesis({"0.0": writes}), data, wrong, draws=5).recovered > 0.95
    assert examine(tree, hypothesis({"embed": Meaning(keys)}), data, wrong, draws=5).recovered < 0.6


def test_wrong_input_is_refused_with_what_would_be_right():
    with pytest.raises(ValueError, match="unknown parent of output 'bot'; did you mean 'both'"):
        examine(xor_network(), Meaning(XOR, {"bot": BOTH}), BITS, loss)
    with pytest.raises(ValueError, match=r"integers a row, got torch\.float32"):
        agreeing(torch.rand(4), torch.arange(4), torch.Generator())
    with pytest.raises(ValueError, match="no performance to recover"):
        examine(xor_network(), Meaning(XOR), BITS, lambda output, data: 0 * output)
    with pytest.raises(ValueError, match="blocks of attention alone"):
        attention_tree(llama_like())
