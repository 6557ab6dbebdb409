"""Switch Transformers against transformers: logits with padding, gradients, files."""

import pytest
import torch
import transformers

import paperworks as pw
from paperworks.checkpoints import from_transformers, load_folder, save_folder
from paperworks.models.encoder import segments_of
from paperworks.models.presets.t5 import switch
from paperworks.nn import Placement

pytestmark = pytest.mark.parity


def config(sparse: int = 2) -> transformers.SwitchTransformersConfig:
    return transformers.SwitchTransformersConfig(
        vocab_size=97, d_model=32, d_kv=6, d_ff=48, num_layers=4, num_decoder_layers=4, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=sparse, num_sparse_decoder_layers=sparse, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip


def oracle(sparse: int = 2) -> transformers.SwitchTransformersForConditionalGeneration:
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config(sparse)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    source, target = torch.randint(1, 97, (2, 21), generator=draws), torch.randint(1, 97, (2, 17), generator=draws)
    return source, target, segments_of(torch.tensor([21, 14]))


def test_logits_and_gradients_equal_transformers() -> None:
    theirs = oracle()
    ours = from_transformers(theirs).eval()
    source, target, segments = inputs()
    expected = theirs(input_ids=source, attention_mask=segments, decoder_input_ids=target).logits
    found = ours(source, target, source_placement=Placement(segments=segments))
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-4
    upstream = torch.randn(2, 17, 97, generator=torch.Generator().manual_seed(2))
    (expected * upstream).sum().backward()
    (found * upstream).sum().backward()
    mixture = theirs.encoder.block[1].layer[1].mlp
    mine = ours.encoder.blocks[1].feedforward
    pairs = [(mine.router.logits.weight, mixture.router.classifier.weight)]
    pairs += [(mine.experts[index].up.weight, mixture.experts[f"expert_{index}"].wi.weight) for index in range(4)]
    assert sum(float(other.grad.abs().sum()) > 0 for _, other in pairs if other.grad is not None) >= 3
    for one, other in pairs:
        if other.grad is None:  # an expert that no token went to
            assert one.grad is None or not one.grad.any()
            continue
        assert (one.grad - other.grad).abs().max() < 1e-3 * other.grad.abs().max()


@pytest.mark.parametrize("sparse", [1, 2, 4])  # every fourth layer from the second on, every other, every one
@torch.no_grad()
def test_the_layout_is_read_and_written(tmp_path, sparse: int) -> None:
    theirs = oracle(sparse)
    source, target, _ = inputs()
    expected = theirs(input_ids=source, decoder_input_ids=target).logits
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_folder(tmp_path / "theirs")
    assert (read(source, target) - expected).abs().max() < 1e-4
    save_folder(read, tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert (back(input_ids=source, decoder_input_ids=target).logits - expected).abs().max() < 1e-4
    assert load_folder(tmp_path / "ours").spec == read.spec


def test_presets_have_the_published_sizes() -> None:
    """switch-base-8 is listed with 619 million parameters: T5-base, and seven more experts in 12 layers of 24."""
    dense = pw.count_parameters(pw.preset("t5-base"))
    assert pw.count_parameters(pw.preset("switch-base-8")) == dense + 12 * (7 * 2 * 768 * 3072 + 8 * 768) == 619_339_008
    assert pw.count_parameters(pw.preset("bloom-560m")) == 559_214_592
    assert pw.count_parameters(pw.preset("bloom-7b1")) == 7_069_016_064
    assert pw.count_parameters(pw.preset("bloom-176b")) == 176_247_271_424


def test_models_that_lose_tokens_are_not_written(tmp_path) -> None:
    lossy = switch(16, 24, 2, 2, 8, experts=2, vocab_size=30).build()
    with pytest.raises(ValueError, match="no Hugging Face family expresses"):
        save_folder(lossy, tmp_path)
    with pytest.raises(ValueError, match="every must be at least 1"):
        switch(16, 24, 2, 2, 8, experts=2, every=0)
