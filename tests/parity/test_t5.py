"""T5 of both versions against transformers, its buckets, files and decoding."""

import pytest
import torch
import transformers

import paperworks as pw
from paperworks.checkpoints import from_transformers, load_folder, save_folder
from paperworks.checkpoints.families import spec_from_config
from paperworks.generation import Sampling, decode
from paperworks.models.encoder import segments_of
from paperworks.models.presets.families import t5
from paperworks.nn import Placement
from paperworks.nn.position.relative import bucket

pytestmark = pytest.mark.parity

VERSIONS = {"first": {}, "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}


def oracle(version, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        **VERSIONS[version],
    )
    model = transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request):
    theirs = oracle(request.param)
    return theirs, from_transformers(theirs)


def inputs():
    draws = torch.Generator().manual_seed(1)
    source, target = torch.randint(1, 97, (2, 21), generator=draws), torch.randint(1, 97, (2, 17), generator=draws)
    return source, target, segments_of(torch.tensor([21, 14]))


@torch.no_grad()
def test_logits_equal_transformers_with_padding(pair):
    theirs, ours = pair
    source, target, segments = inputs()
    expected = theirs(input_ids=source, attention_mask=segments, decoder_input_ids=target).logits
    assert expected.std() > 0.05
    assert (ours(source, target, source_placement=Placement(segments=segments)) - expected).abs().max() < 1e-4


def test_gradients_equal_transformers_for_the_shared_table_too(pair):
    theirs, ours = pair
    source, target, _ = inputs()
    upstream = torch.randn(2, 17, 97, generator=torch.Generator().manual_seed(2))
    (ours(source, target) * upstream).sum().backward()
    (theirs(input_ids=source, decoder_input_ids=target).logits * upstream).sum().backward()
    shared = ours.encoder.embedding.weight.grad
    if not ours.spec.decoder.tied:  # theirs counts the head with the table
        shared = shared + ours.decoder.unembedding.weight.grad
    assert (shared - theirs.shared.weight.grad).abs().max() < 1e-3 * theirs.shared.weight.grad.abs().max()
    for one, other in (
        (
            ours.decoder.blocks[0].mixer.relative.weight,
            theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (ours.decoder.blocks[2].cross.key.weight, theirs.decoder.block[2].layer[1].EncDecAttention.k.weight),
    ):
        assert (one.grad - other.grad).abs().max() < 1e-3 * other.grad.abs().max()
    ours.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_greedy_continuations_equal_transformers(pair):
    theirs, ours = pair
    source, _, segments = inputs()
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(input_ids=source, attention_mask=segments, **settings)[:, 1:]
    start = torch.zeros(2, 1, dtype=torch.int64)
    steps = decode(
        ours.conditioned(source, Placement(segments=segments)),
        start,
        max_new_tokens=9,
        sampling=Sampling(temperature=0.0),
    )
    assert torch.equal(torch.stack(list(steps), 1), expected)


@torch.no_grad()
def test_files_are_read_and_written(pair, tmp_path):
    theirs, ours = pair
    source, target, _ = inputs()
    theirs.save_pretrained(tmp_path / "theirs")
    assert (load_folder(tmp_path / "theirs")(source, target) - ours(source, target)).abs().max() == 0
    save_folder(ours, tmp_path / "ours")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    expected = theirs(input_ids=source, decoder_input_ids=target).logits
    assert (back(input_ids=source, decoder_input_ids=target).logits - expected).abs().max() < 1e-4
    pw.save(ours, tmp_path / "native")
    assert torch.equal(pw.load(tmp_path / "native")(source, target), ours(source, target))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_equal_transformers_for_every_distance(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-400, 401)
    for count, longest in ((32, 128), (8, 12)):
        expected = T5Attention._relative_position_bucket(distance, bidirectional, count, longest)
        assert torch.equal(bucket(distance, count, longest, bidirectional=bidirectional), expected)


@torch.no_grad()
def test_weights_begin_as_the_paper_says():
    """Embedding N(0, 1); q (d d_kv)^-0.5; k, v, wi and the table d^-0.5; o (h d_kv)^-0.5; wo d_ff^-0.5 (catalogue)."""
    torch.manual_seed(0)
    model = t5(64, 256, 2, 8, 16, vocab_size=500).build()
    block = model.decoder.blocks[1]
    for weight, std in (
        (model.encoder.embedding.weight, 1.0),
        (block.mixer.query.weight, (64 * 16) ** -0.5),
        (block.mixer.key.weight, 64**-0.5),
        (block.cross.output.weight, (8 * 16) ** -0.5),
        (block.feedforward.up.weight, 64**-0.5),
        (block.feedforward.down.weight, 256**-0.5),
        (block.mixer.relative.weight, 64**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "T5 with feed_forward_proj='gated-silu' is not read"),
        ({"num_decoder_layers": 5}, "another depth than its encoder"),
    ],
)
def test_options_that_no_published_model_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        spec_from_config(oracle("first").config.to_dict() | change)
