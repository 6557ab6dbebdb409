import pytest
import torch

import paperworks as pw
from paperworks.generation import Sampling, decode
from paperworks.models import Block
from paperworks.nn import Attention, GatedMLP, LearnedPositions, RMSNorm

from .small import build, reference


@pytest.fixture(scope="module")
def model():
    return build()


def test_greedy_equals_repeated_full_forward_passes_for_unequal_prompts(model):
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [1, 2, 3]]
    rows = torch.stack(list(decode(model, prompts, max_new_tokens=10, sampling=Sampling(temperature=0.0))), 1)
    for prompt, row in zip(prompts, rows.tolist(), strict=True):
        assert row == reference(model, prompt, 10)


def test_learned_positions_survive_left_padding():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2), feedforward=GatedMLP(hidden=24))
    model = build(block=block, position=LearnedPositions(length=32))
    rows = torch.stack(list(decode(model, [[1, 2, 3, 4], [7]], max_new_tokens=8, sampling=Sampling(temperature=0))), 1)
    assert rows[1].tolist() == reference(model, [7], 8)


def test_texts_give_texts_and_tokens_give_tokens(model):
    assert isinstance(pw.generate(model, "hello", max_new_tokens=3), str)
    assert len(pw.generate(model, ["hello", "hi"], max_new_tokens=3)) == 2
    assert pw.generate(model, torch.tensor([[1, 2]]), max_new_tokens=3, stop_tokens=()).shape == (1, 3)


def test_seeds_make_draws_reproducible(model):
    draws = [pw.generate(model, "hello", max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_text_ends_before_the_stop_string_even_across_tokens(model):
    whole = pw.generate(model, "hello", max_new_tokens=20, temperature=0.0)
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    assert pw.generate(model, "hello", max_new_tokens=20, temperature=0.0, stop=stop) == expected
    rows = pw.generate(model, ["hello", "hello there"], max_new_tokens=20, temperature=0.0, stop=[stop])
    assert rows[0] == expected
    other = pw.generate(model, "hello there", max_new_tokens=20, temperature=0.0)
    assert rows[1] == (other[: other.index(stop)] if stop in other else other)


def test_a_stop_token_ends_its_row_only(model):
    free = pw.generate(model, torch.tensor([[5, 6], [9, 3]]), max_new_tokens=8, temperature=0.0, stop_tokens=())
    stop = int(free[0, 3])
    first = free[0].tolist().index(stop)
    rows = pw.generate(
        model, torch.tensor([[5, 6], [9, 3]]), max_new_tokens=8, temperature=0.0, stop_tokens=[stop], pad=77
    )
    assert rows[0].tolist() == free[0, :first].tolist() + [77] * (rows.shape[1] - first)
    if stop not in free[1].tolist():
        assert rows[1].tolist() == free[1].tolist()


def test_streamed_pieces_join_to_the_text_and_hide_the_stop_string(model):
    pieces = []
    whole = pw.generate(model, "hello", max_new_tokens=20, temperature=0.0)
    assert pw.generate(model, "hello", max_new_tokens=20, temperature=0.0, stream=pieces.append) == "".join(pieces)
    assert len(pieces) > 5
    pieces.clear()
    pw.generate(model, "hello", max_new_tokens=20, temperature=0.0, stop=whole[7:10], stream=pieces.append)
    assert "".join(pieces) == whole[: whole.index(whole[7:10])]


def test_the_models_mode_is_put_back_after_decoding(model):
    model.train()
    model.blocks[0].eval()
    pw.generate(model, "hello", max_new_tokens=2)
    assert model.training
    assert not model.blocks[0].training


def test_wrong_requests_are_refused(model):
    with pytest.raises(ValueError, match="a prompt is empty"):
        list(decode(model, [[1], []], max_new_tokens=1, sampling=Sampling()))
    with pytest.raises(ValueError, match="encodes to no token"):
        pw.generate(model, "")
    with pytest.raises(ValueError, match="stream follows one prompt"):
        pw.generate(model, ["a", "b"], stream=print)
    with pytest.raises(ValueError, match="no tokenizer"):
        pw.generate(build_without_tokenizer(), "text")
    with pytest.raises(ValueError, match="no chat template"):
        pw.chat(model, [{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="exceed the context of 8"):
        pw.generate(build(context=8), "hello", max_new_tokens=10)


def build_without_tokenizer():
    model = build()
    model.tokenizer = None
    return model
