"""The real SmolLM2-135M-Instruct: our GGUF loading against transformers' own."""

import pytest
import torch

from paperworks.nn import Placement

pytestmark = [pytest.mark.parity, pytest.mark.asset, pytest.mark.slow]

# float32 sums of up to 1,536 terms in 30 layers, ordered differently; logits reach 30.
LOGITS = 2e-3
# The same comparison in one implementation: only the shapes of the matrix products differ.
CACHED = 1e-3

TEXT = "The lighthouse keeper climbed the narrow stairs every evening to light the lamp."
PROMPT = "Once upon a time, in a village by the sea,"


@pytest.fixture(scope="module")
def theirs(smollm2):
    """transformers' model from the same file: dequantizing it takes some 25 seconds, so once for all tests."""
    import transformers

    from paperworks.data.assets import assets

    path = assets.fetch("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def tokens(model, text):
    return torch.tensor([model.tokenizer.encode(text, bos=False)])


@torch.no_grad()
def test_logits_equal_transformers_own_reading_of_the_file(smollm2, theirs):
    ids = tokens(smollm2, TEXT)
    expected = theirs(ids).logits
    assert expected.std() > 1  # the comparison is not between zeros
    assert float((smollm2(ids) - expected).abs().max()) <= LOGITS


@torch.no_grad()
def test_every_weight_equals_transformers_own(smollm2, theirs):
    from paperworks.checkpoints import from_transformers

    read = from_transformers(theirs)
    assert (read.spec.dim, read.spec.depth, read.spec.tied) == (smollm2.spec.dim, smollm2.spec.depth, smollm2.spec.tied)
    assert list(read.state_dict()) == list(smollm2.state_dict())
    # Both decode the same blocks: scale * integer + minimum in float32, in one rounding or two.
    for (name, one), other in zip(smollm2.state_dict().items(), read.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)


@torch.no_grad()
def test_64_greedy_tokens_equal_transformers(smollm2, theirs):
    from paperworks.generation import generate

    prompt = tokens(smollm2, PROMPT)
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, prompt.shape[1] :]
    found = generate(smollm2, prompt, max_new_tokens=64, temperature=0.0, stop_tokens=())
    assert expected.shape[1] == 64
    assert torch.equal(found, expected)


@torch.no_grad()
def test_left_padded_rows_equal_transformers(smollm2, theirs):
    rows = [tokens(smollm2, PROMPT)[0], tokens(smollm2, TEXT)[0]]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert float((smollm2(ids, Placement(segments=mask))[real] - expected[real]).abs().max()) <= LOGITS


@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole_text(smollm2):
    ids = tokens(smollm2, TEXT)
    cache = smollm2.new_cache(1, ids.shape[1])
    parts = [smollm2(part, Placement(cache=cache)) for part in ids.split(5, dim=1)]
    assert float((torch.cat(parts, 1) - smollm2(ids)).abs().max()) <= CACHED


@torch.no_grad()
def test_rows_in_the_files_order_are_another_model(smollm2, theirs):
    """The trap the equality above guards against: without the permutation nothing fails but the numbers."""
    from paperworks.checkpoints.layout import RotaryPermuted

    ids = tokens(smollm2, TEXT)
    expected = theirs(ids).logits
    first = smollm2.blocks[0].mixer
    kept = first.query.weight.clone()
    try:
        first.query.weight.copy_(RotaryPermuted(9).join([kept]))
        assert float((smollm2(ids) - expected).abs().max()) > 100 * LOGITS
    finally:
        first.query.weight.copy_(kept)
