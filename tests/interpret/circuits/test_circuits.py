import pytest
import torch
from torch import nn

from paperworks.interpret.circuits import circuits
from paperworks.interpret.circuits.circuits import (
    Factored,
    composition,
    composition_scores,
    copying_score,
    full_ov,
    full_qk,
)
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, NoNorm
from tests.interpret.lenses.test_logit_lens import TOKENS, llama_like


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention_only(depth=2, kv_heads=None):
    torch.manual_seed(0)
    block = Block(norm=NoNorm(), mixer=Attention(heads=4, kv_heads=kv_heads))
    return Decoder(vocab_size=31, dim=16, depth=depth, block=block, norm=None, init_std=0.4).build().eval().double()


def test_a_factored_matrix_is_its_product():
    a, b = Factored(random(9, 3), random(3, 7, seed=1)), Factored(random(7, 2, seed=2), random(2, 9, seed=3))
    assert torch.allclose((a @ b).dense(), a.dense() @ b.dense())
    assert torch.allclose((a @ random(7, 5)).dense(), a.dense() @ random(7, 5))
    assert torch.allclose(a.after(random(4, 9)).dense(), random(4, 9) @ a.dense())
    assert torch.allclose(a.mT.dense(), a.dense().mT)
    assert a.norm().item() == pytest.approx(a.dense().norm().item(), rel=1e-12)
    with pytest.raises(ValueError, match="factors do not fit"):
        Factored(random(3, 2), random(3, 2))
    with pytest.raises(ValueError, match="this is 9 x 7"):
        a.eigenvalues()


def test_eigenvalues_and_singular_values_are_those_of_the_large_matrix():
    matrix = Factored(random(20, 4), random(4, 20, seed=1))
    large = torch.linalg.eigvals(matrix.dense())
    large = large[large.abs().argsort(descending=True)]
    small = matrix.eigenvalues()
    small = small[small.abs().argsort(descending=True)]
    assert torch.allclose(large[:4].abs(), small.abs())
    assert torch.allclose(large[:4].real.sum(), small.real.sum())
    assert large[4:].abs().max() < 1e-9
    u, s, vh = matrix.svd()
    assert torch.allclose(s, torch.linalg.svdvals(matrix.dense())[:4])
    assert torch.allclose(u * s @ vh, matrix.dense())


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_heads_write_and_score_by_their_circuits(kv_heads):
    model = attention_only(1, kv_heads)
    mixer = model.blocks[0].mixer
    x = random(1, 5, 16)
    queries = mixer.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
    keys = mixer.key(x).unflatten(-1, (-1, 4)).transpose(1, 2)
    values = mixer.value(x).unflatten(-1, (-1, 4)).transpose(1, 2)
    for head in range(4):
        shared = head if kv_heads is None else head // 2
        scores = queries[0, head] @ keys[0, shared].mT
        assert torch.allclose(x[0] @ circuits.qk_circuit(mixer, head).dense() @ x[0].mT, scores)
        written = values[0, shared] @ mixer.output.weight[:, 4 * head : 4 * head + 4].mT
        assert torch.allclose(x[0] @ circuits.ov_circuit(mixer, head).dense(), written)


@pytest.mark.parametrize(("depth", "kv_heads"), [(1, None), (2, 2)])
def test_paths_add_up_to_the_logits(depth, kv_heads):
    model = attention_only(depth, kv_heads)
    paths = circuits.path_expansion(model, TOKENS)
    assert len(paths) == 5**depth
    with torch.no_grad():
        assert (sum(paths.values()) - model(TOKENS)).abs().max() < 1e-10
    bigrams = circuits.direct_path(model).dense()
    assert torch.allclose(paths[()], bigrams[TOKENS])
    if depth == 2:
        from paperworks import interpret

        with interpret.record(model, "*.pattern") as seen, torch.no_grad():
            model(TOKENS)
        both = seen["blocks.1.mixer.pattern"][:, 3] @ seen["blocks.0.mixer.pattern"][:, 1]
        one, two = (circuits.ov_circuit(model.blocks[layer].mixer, head) for layer, head in ((0, 1), (1, 3)))
        expected = both @ model.embedding(TOKENS) @ one.dense() @ two.dense() @ model.unembedding.weight.mT
        assert torch.allclose(paths["0.1", "1.3"], expected)


def test_scores_do_not_depend_on_how_a_product_is_split():
    model = attention_only()
    before = composition_scores(model), copying_score(full_ov(model, 1, 2)), full_qk(model, 1, 0).dense()
    with torch.no_grad():
        for block in model.blocks:
            for head in range(4):
                part = slice(4 * head, 4 * head + 4)
                change = random(4, 4, seed=head) + 3 * torch.eye(4, dtype=torch.float64)
                block.mixer.query.weight[part] = change.mT @ block.mixer.query.weight[part]
                block.mixer.key.weight[part] = torch.linalg.inv(change) @ block.mixer.key.weight[part]
                block.mixer.value.weight[part] = change.mT @ block.mixer.value.weight[part]
                block.mixer.output.weight[:, part] = block.mixer.output.weight[:, part] @ torch.linalg.inv(change).mT
    after = composition_scores(model), copying_score(full_ov(model, 1, 2)), full_qk(model, 1, 0).dense()
    for kind in "QKV":
        assert torch.allclose(before[0][kind], after[0][kind], atol=1e-6)
    assert before[1] == pytest.approx(after[1], abs=1e-9)
    assert torch.allclose(before[2], after[2])


def test_a_head_that_copies_scores_one_and_one_that_erases_minus_one():
    basis = random(12, 4)
    assert copying_score(Factored(basis, basis.mT)) == pytest.approx(1)
    assert copying_score(Factored(-basis, basis.mT)) == pytest.approx(-1)
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert copying_score(Factored(rotation, torch.eye(2, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    assert copying_score(Factored(0 * basis, basis.mT)) == 0


def test_composition_is_one_for_one_shared_direction_and_zero_for_separate_ones():
    u, v, w = torch.linalg.qr(random(8, 3)).Q.mT[:, :, None]
    assert composition(Factored(u, v.mT), Factored(v, w.mT)) == pytest.approx(1)
    assert composition(Factored(u, v.mT), Factored(u, w.mT)) == pytest.approx(0, abs=1e-12)


def test_composition_kinds_are_told_apart():
    """A head written so that only its keys read what an earlier head writes."""
    model = attention_only()
    early, late = model.blocks[0].mixer, model.blocks[1].mixer
    eye = torch.eye(16, dtype=torch.float64)
    with torch.no_grad():
        for linear in (early.value, early.output, late.query, late.key, late.value, late.output):
            linear.weight.zero_()
        early.value.weight[:4], early.output.weight[:, :4] = eye[:4], eye[4:8].mT  # dims 0-3 are written to 4-7
        late.key.weight[:4], late.query.weight[:4] = eye[4:8], eye[8:12]
        late.value.weight[:4], late.output.weight[:, :4] = eye[:4], eye[12:].mT
    scores = composition_scores(model, baseline=False)
    assert scores["K"][0, 0] == pytest.approx(0.5)  # 4 equal singular values: sqrt(4) / (2 x 2)
    assert scores["Q"][0, 0] == 0
    assert scores["V"][0, 0] == 0
    assert not scores["K"][1:].any()


def test_chance_is_subtracted():
    scores = composition_scores(attention_only())
    assert max(values.abs().mean() for values in scores.values()) < 0.05


def test_skip_trigrams_are_the_largest_entries():
    model = attention_only(1)
    attends, raises = full_qk(model, 0, 2).dense(), full_ov(model, 0, 2).dense()
    source, destination, output, weight = circuits.skip_trigrams(model, 0, 2, most=3)[0]
    assert attends[destination, source] == attends.max()
    assert output == raises[source].argmax()
    assert weight == pytest.approx((attends.max() * raises[source].max()).item())
    assert len(circuits.skip_trigrams(model, 0, 2, most=3)) == 3


def test_wrong_input_is_refused_with_what_would_be_right():
    model = attention_only()
    with pytest.raises(ValueError, match="heads 0 to 3"):
        full_ov(model, 0, 4)
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        full_ov(model, 2, 0)
    with pytest.raises(ValueError, match="must come before the second; got 1 and 1"):
        composition_scores(model, 1, 1)
    with pytest.raises(ValueError, match="attention-only models without norms"):
        circuits.path_expansion(llama_like(), TOKENS)
    with pytest.raises(ValueError, match="from_transformers first"):
        circuits.direct_path(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="from_transformers first"):
        circuits.attention_of(nn.Linear(2, 2), 0)
