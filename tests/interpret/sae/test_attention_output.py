"""Attribution of attention-output features to heads, source positions and what stood there."""

import pytest
import torch

from paperworks import interpret
from paperworks.interpret import sae
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE

HEADS, KV_HEADS, HEAD_DIM, DIM, TIME = 4, 2, 6, 16, 7
KINDS = {
    "standard": sae.Standard(latents=30, penalty=1.0),
    "weighted": sae.Standard(latents=30, penalty=1.0, decoder="weighted"),
    "topk": sae.TopK(latents=30, k=4),
    "gated": sae.Gated(latents=30, penalty=1.0),
}


@pytest.fixture
def seen():
    torch.manual_seed(0)
    mixer = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, position=RoPE())
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=32))
    model = Decoder(vocab_size=20, dim=DIM, depth=2, block=block, norm=RMSNorm()).build().double().eval()
    with torch.no_grad():
        model.blocks[1].mixer_norm.weight.uniform_(0.5, 1.5)
    targets = [
        "blocks.1.mixer.{heads,pattern,value}",
        "blocks.0",
        "blocks.0.mixer",
        "blocks.0.feedforward",
        "embedding",
    ]
    with interpret.record(model, targets) as seen, torch.no_grad():
        model(torch.arange(TIME)[None])
    return model, seen


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_sources_add_up_to_the_pre_activation(seen, kind):
    _, values = seen
    z = sae.merged_heads(values["blocks.1.mixer.heads"])[0]
    torch.manual_seed(1)
    model = KINDS[kind].build(HEADS * HEAD_DIM).double()
    with torch.no_grad():
        for name in (*model.latent_biases(), "decoder_bias"):
            model.get_parameter(name).normal_()
    centred = z if kind == "weighted" else z - model.decoder_bias
    bias = model.gate_bias if kind == "gated" else model.encoder_bias
    before = centred @ model.encoder.T + bias
    for latent, position in ((0, 6), (11, 3), (29, 0)):
        parts = sae.attribute_to_heads(
            model,
            latent,
            position,
            values["blocks.1.mixer.pattern"][0],
            values["blocks.1.mixer.value"][0].unflatten(-1, (KV_HEADS, HEAD_DIM)),
        )
        assert parts.sources.shape == (HEADS, TIME)
        assert not parts.sources[:, position + 1 :].any()  # nothing comes from the future
        assert parts.sources.sum().item() + parts.constant == pytest.approx(before[position, latent].item(), abs=1e-12)
        by_head = (z[position].view(HEADS, HEAD_DIM) * model.encoder[latent].view(HEADS, HEAD_DIM)).sum(1)
        assert torch.allclose(parts.heads, by_head, atol=1e-12)


def test_one_step_up_adds_up_to_the_sources_with_norms_frozen(seen):
    model, values = seen
    torch.manual_seed(1)
    features = KINDS["standard"].build(HEADS * HEAD_DIM).double()
    pattern = values["blocks.1.mixer.pattern"][0]
    stream = values["blocks.0"][0]
    components = {name: values[name][0] for name in ("embedding", "blocks.0.mixer", "blocks.0.feedforward")}
    assert torch.allclose(sum(components.values()), stream, atol=1e-12)
    norm, mixer = model.blocks[1].mixer_norm, model.blocks[1].mixer
    scale = (stream.square().mean(dim=-1) + norm.eps).rsqrt()
    parts = sae.through_values(features, 3, 5, pattern, mixer.value.weight * norm.weight, components, scale)
    direct = sae.attribute_to_heads(
        features, 3, 5, pattern, values["blocks.1.mixer.value"][0].unflatten(-1, (KV_HEADS, HEAD_DIM))
    )
    assert torch.allclose(sum(parts.values()), direct.sources, atol=1e-12)
    assert all(part.abs().max() > 1e-6 for part in parts.values())


def test_head_shares_add_up_to_one_and_know_a_single_heads_feature():
    model = KINDS["standard"].build(HEADS * HEAD_DIM)
    with torch.no_grad():
        model.decoder[0] = 0
        model.decoder[0, HEAD_DIM : 2 * HEAD_DIM] = 1
    shares = sae.head_shares(model, HEADS)
    assert torch.allclose(shares.sum(dim=1), torch.ones(30), atol=1e-6)
    assert shares[0].tolist() == pytest.approx([0, 1, 0, 0])


def test_a_buffer_reads_merged_heads(seen):
    model, values = seen
    tokens = torch.arange(TIME)[None]
    tap = "blocks.1.mixer.heads"
    rows = next(sae.Activations(model, tap, [tokens], size=1, capacity=8, read=sae.merged_heads).rows())
    assert torch.equal(rows, values[tap][0, 1:].flatten(1))


def test_shapes_that_do_not_fit_are_refused():
    model = KINDS["standard"].build(HEADS * HEAD_DIM)
    pattern, values = torch.rand(HEADS, TIME, TIME), torch.rand(TIME, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"pattern \(4, 7, 7\), values \(7, 2, 5\)"):
        sae.attribute_to_heads(model, 0, 0, pattern, torch.rand(TIME, KV_HEADS, 5))
    with pytest.raises(ValueError, match="latent 30 is not one of the 30"):
        sae.attribute_to_heads(model, 30, 0, pattern, values)
    with pytest.raises(ValueError, match="size 24 are not the outputs of 5 heads"):
        sae.head_shares(model, 5)
    with pytest.raises(ValueError, match=r"value weight \(13, 16\) does not hold whole heads of 6"):
        sae.through_values(model, 0, 0, pattern, torch.rand(13, 16), {})
    with pytest.raises(ValueError, match=r"\(batch, time, heads, head_dim\), got shape \(2, 3\)"):
        sae.merged_heads(torch.zeros(2, 3))
