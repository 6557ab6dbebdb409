import pytest
import torch

import paperworks as pw
from paperworks.generation import Sampling, beam_search, decode
from paperworks.generation.matvec import fast_linears, product
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, LearnedPositions, RMSNorm, RoPE

VOCAB = 128


class Letters:
    """A tokenizer of ASCII characters, with the interface that generate asks for."""

    stop_ids = (0,)
    chat_template = None
    vocab_size = VOCAB

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def stream(self):
        return self

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


def build(**changes):
    torch.manual_seed(0)
    mixer = Attention(heads=2, kv_heads=1, position=RoPE(), window=6)
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    spec = Decoder(
        **{"vocab_size": VOCAB, "dim": 16, "depth": 2, "block": block, "norm": RMSNorm(), "init_std": 0.5, **changes}
    )
    model = spec.build()
    model.tokenizer = Letters()
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def reference(model, prompt, count):
    """Greedy decoding with a full forward pass for each token."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model.eval()(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, len(prompt) :].tolist()


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


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_products_by_blocks_of_rows_equal_the_plain_product(rows, blocks):
    x, weight = torch.randn(rows, 12, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    assert (product(x, weight, blocks) - x @ weight.T).abs().max() < 1e-12


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_fast_products_equal_torch_and_leave_no_trace():
    model = build(block=Block(norm=RMSNorm(), mixer=Attention(heads=2, bias=True), feedforward=GatedMLP(hidden=24)))
    tokens = torch.randint(0, VOCAB, (2, 1))
    with torch.no_grad():
        before = model(tokens)
        with fast_linears(model):
            assert "forward" in vars(model.unembedding)
            assert (model(tokens) - before).abs().max() < 1e-5
            model.blocks[0].mixer.query.weight.data = model.blocks[0].mixer.query.weight * 2  # storage swapped
            assert not torch.allclose(model(tokens), before)
        doubled = model(tokens)
        with fast_linears(model):
            assert (model(tokens) - doubled).abs().max() < 1e-5
    assert "forward" not in vars(model.unembedding)
    with fast_linears(model), torch.enable_grad():
        model(tokens).sum().backward()  # gradients take torch's path
    assert model.unembedding.weight.grad is not None


def exhaustive(model, prompt, length, penalty, stop):
    """Every continuation scored: what beam search finds when it has beams for all of them."""
    best = (-float("inf"), [])

    def extend(tokens, score, new):
        nonlocal best
        if new and (new[-1] == stop or len(new) == length):
            value = score / len(new) ** penalty
            if value > best[0]:
                best = (value, new[:-1] if new[-1] == stop else new)
            return
        logp = torch.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)
        for token in range(len(logp)):
            extend([*tokens, token], score + float(logp[token]), [*new, token])

    extend(prompt, 0.0, [])
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_wide_beam_search_finds_the_best_of_all_sequences(penalty):
    model = build(vocab_size=5).eval()
    found = beam_search(model, [[1, 2]], beams=125, max_new_tokens=3, length_penalty=penalty, stop_tokens=[4], pad=-1)
    expected = exhaustive(model, [1, 2], 3, penalty, 4)
    assert [token for token in found[0].tolist() if token >= 0] == expected


@torch.no_grad()
def test_one_beam_is_greedy_and_batches_do_not_mix():
    model = build()
    greedy = reference(model, [3, 4], 6)
    assert beam_search(model, [[3, 4]], beams=1, max_new_tokens=6)[0].tolist() == greedy
    apart = [beam_search(model, [prompt], beams=3, max_new_tokens=6)[0].tolist() for prompt in ([3, 4], [9, 8, 7])]
    assert beam_search(model, [[3, 4], [9, 8, 7]], beams=3, max_new_tokens=6).tolist() == apart


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
