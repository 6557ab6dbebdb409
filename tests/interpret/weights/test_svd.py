import pytest
import torch
from torch import nn

from paperworks.interpret.circuits.circuits import ov_circuit
from paperworks.interpret.weights import svd
from tests.interpret.lenses.test_logit_lens import TOKENS, llama_like


@pytest.fixture(scope="module")
def model():
    return llama_like().double()


def ov(model, layer, head):
    return ov_circuit(model.blocks[layer].mixer, head).dense()


def test_directions_from_thin_factors_are_those_of_the_whole_matrix(model):
    found = svd.ov_directions(model, 1, 3)
    whole = torch.linalg.svd(ov(model, 1, 3))
    assert len(found.strengths) == 4  # head_dim
    assert torch.allclose(found.strengths, whole.S[:4])
    assert whole.S[4:].max() < 1e-10
    assert torch.allclose((found.writes @ whole.Vh[:4].mT).abs(), torch.eye(4).double(), atol=1e-8)
    assert torch.allclose((found.reads @ whole.U[:, :4]).abs(), torch.eye(4).double(), atol=1e-8)
    down = svd.linear_directions(model.blocks[0].feedforward.down)
    rebuilt = down.reads.mT * down.strengths @ down.writes
    assert torch.allclose(rebuilt, model.blocks[0].feedforward.down.weight.mT)


def test_removing_a_direction_removes_it_and_nothing_else(model):
    before, plain = svd.ov_directions(model, 1, 3), ov(model, 1, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    others = ov(model, 1, 2)
    with torch.no_grad():
        logits = model(TOKENS)
    with svd.without_direction(model, 1, 3, 0), torch.no_grad():
        edited = ov(model, 1, 3)
        assert abs(before.reads[0] @ edited @ before.writes[0]) < 1e-10
        expected = plain - before.strengths[0] * torch.outer(before.reads[0], before.writes[0])
        assert torch.allclose(edited, expected)
        for index in range(1, 4):
            assert torch.allclose(before.reads[index] @ edited @ before.writes[index], before.strengths[index])
        assert torch.equal(ov(model, 1, 2), others)
        assert not torch.allclose(model(TOKENS), logits)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with svd.without_direction(model, 1, 3, 0, alpha=2.0):
        assert torch.allclose(before.reads[0] @ ov(model, 1, 3) @ before.writes[0], -before.strengths[0])


def test_weights_are_back_after_an_exception(model):
    before = model.blocks[1].mixer.output.weight.clone()
    with pytest.raises(RuntimeError), svd.without_direction(model, 1, 0, 1):
        raise RuntimeError
    assert torch.equal(model.blocks[1].mixer.output.weight, before)


def test_both_ends_swap_when_the_sign_does(model):
    words = svd.vocabulary(model)
    writes = svd.ov_directions(model, 0, 1).writes
    raised, lowered = svd.top_tokens(writes, words, 5)
    again, other = svd.top_tokens(-writes, words, 5)
    assert torch.equal(raised, other)
    assert torch.equal(lowered, again)
    assert raised[0, 0] == (writes[0] @ words.mT).argmax()


def test_the_final_gain_is_part_of_the_vocabulary(model):
    assert torch.equal(svd.vocabulary(model), model.unembedding.weight * model.norm.weight)
    gemma = llama_like(norm=model.spec.norm.__class__(offset=True))
    assert torch.allclose(svd.vocabulary(gemma), gemma.unembedding.weight * (1 + gemma.norm.weight))
    plain = llama_like(norm=None)
    assert torch.equal(svd.vocabulary(plain), plain.unembedding.weight)


def test_coherence_is_the_mean_cosine_of_pairs():
    table = torch.randn(20, 6, dtype=torch.float64)
    groups = torch.tensor([[1, 4, 7], [2, 3, 19]])
    centred = table - table.mean(0)
    for row, group in enumerate(groups):
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [torch.cosine_similarity(centred[group[i]], centred[group[j]], dim=0) for i, j in pairs]
        assert svd.coherence(groups, table)[row].item() == pytest.approx((sum(cosines) / 3).item())
    with pytest.raises(ValueError, match="at least two tokens"):
        svd.coherence(groups[:, :1], table)


def test_a_direction_finds_itself_among_all(model):
    sources = [svd.ov_directions(model, layer, head) for layer in range(3) for head in range(4)]
    name, index, cosine = svd.most_aligned(-3 * sources[6].writes[2], sources)[0]
    assert (name, index) == ("1.2", 2)
    assert cosine == pytest.approx(-1)


def test_wrong_input_is_refused_with_what_would_be_right(model):
    with pytest.raises(ValueError, match="directions 0 to 3"), svd.without_direction(model, 0, 0, 4):
        pass
    with pytest.raises(ValueError, match="between 1 and the 31 tokens"):
        svd.top_tokens(torch.zeros(1, 16), svd.vocabulary(model).float(), 32)
    with pytest.raises(ValueError, match="from_transformers first"):
        svd.vocabulary(nn.Linear(2, 2))
