"""GPT against transformers' OpenAIGPT: the language model, the double head, and the files."""

import pytest
import torch
import transformers

from paperworks.checkpoints import from_transformers, load_folder, save_folder
from paperworks.models.heads import TaskModel

pytestmark = pytest.mark.parity


def config() -> transformers.OpenAIGPTConfig:
    return transformers.OpenAIGPTConfig(
        vocab_size=41, n_positions=32, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager", initializer_range=0.2, summary_first_dropout=0.0, num_labels=1,
    )  # fmt: skip


def test_logits_and_gradients_equal_transformers() -> None:
    torch.manual_seed(0)
    theirs = transformers.OpenAIGPTLMHeadModel(config()).double().eval()
    ours = from_transformers(theirs)
    tokens = torch.randint(41, (2, 17))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    assert torch.allclose(ours(tokens), expected, atol=1e-11)
    expected.logsumexp(-1).sum().backward()
    ours(tokens).logsumexp(-1).sum().backward()
    assert torch.allclose(ours.embedding.weight.grad, theirs.transformer.tokens_embed.weight.grad, atol=1e-9)
    assert torch.allclose(
        ours.blocks[0].mixer.key.weight.grad, theirs.transformer.h[0].attn.c_attn.weight.grad.T[24:48], atol=1e-9
    )


def test_the_last_token_through_the_head_equals_the_double_head() -> None:
    torch.manual_seed(1)
    theirs = transformers.OpenAIGPTDoubleHeadsModel(config()).double().eval()
    plain = transformers.OpenAIGPTLMHeadModel(config()).double()
    plain.transformer.load_state_dict(theirs.transformer.state_dict())
    plain.tie_weights()
    ours = TaskModel(from_transformers(plain), reading="choice").eval()
    head = theirs.multiple_choice_head.summary
    ours.head.load_state_dict(head.state_dict())
    lengths = torch.tensor([[9, 5], [3, 9]])
    tokens = torch.randint(41, (2, 2, 9))
    segments = (torch.arange(9) < lengths[..., None]).long()
    expected = theirs(tokens, mc_token_ids=lengths - 1)
    said = ours(tokens, segments, language=True)
    assert torch.allclose(said.task, expected.mc_logits, atol=1e-11)
    real = segments.flatten(0, 1).bool()
    assert said.language is not None
    assert torch.allclose(said.language[real], expected.logits.flatten(0, 1)[real], atol=1e-11)


def test_the_folder_is_read_and_written(tmp_path) -> None:
    torch.manual_seed(2)
    theirs = transformers.OpenAIGPTLMHeadModel(config()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_folder(tmp_path / "theirs")
    tokens = torch.randint(41, (2, 8))
    assert torch.allclose(read(tokens), theirs(tokens).logits, atol=1e-5)
    save_folder(read, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.allclose(back(tokens).logits, theirs(tokens).logits, atol=1e-5)
    assert load_folder(tmp_path / "ours").spec == read.spec
