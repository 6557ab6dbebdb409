"""Mamba and RWKV against transformers on the same random weights, and their files both ways."""

import pytest
import torch
import transformers

from paperworks.checkpoints import from_transformers, load_folder, save_folder
from paperworks.checkpoints.families import spec_from_config
from paperworks.generation import Sampling, decode
from tests.parity.families import RECURRENT, oracle

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=RECURRENT)
def pair(request):
    theirs = oracle(request.param)
    return theirs, from_transformers(theirs)


def tokens(time=19):
    return torch.randint(1, 97, (2, time), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    expected = theirs(tokens()).logits
    assert expected.std() > 0.1
    assert (ours(tokens()) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_continuations_equal_transformers(pair):
    theirs, ours = pair
    prompt = tokens(6)[:1]  # transformers' RWKV confuses batch and time when it decodes more than one row
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 6:]
    found = torch.stack(list(decode(ours, prompt, max_new_tokens=12, sampling=Sampling(temperature=0.0))), 1)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_files_are_read_and_written(pair, tmp_path):
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "theirs")
    assert (load_folder(tmp_path / "theirs")(tokens()) - ours(tokens())).abs().max() == 0
    save_folder(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (back(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba", "use_bias": True}, "mamba with use_bias=True is not read"),
        ({"model_type": "mamba", "intermediate_size": 65}, "intermediate_size is not expand x hidden_size"),
        ({"model_type": "rwkv", "attention_hidden_size": 16}, "attention_hidden_size is not hidden_size"),
    ],
)
def test_options_that_no_published_model_has_are_refused(change, message):
    config = RECURRENT[change["model_type"]]().to_dict() | change
    with pytest.raises(ValueError, match=message):
        spec_from_config(config)
