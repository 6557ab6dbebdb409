import torch

from paperworks.models import Block, Decoder, count_parameters
from paperworks.nn import Attention, Spec
from paperworks.nn.identity_norm import NoNorm


def test_no_norm_gives_back_what_it_gets_and_has_no_parameters():
    x = torch.randn(2, 3, 8)
    assert torch.equal(NoNorm().build(8)(x), x)
    assert count_parameters(NoNorm().build(8)) == 0


def test_a_model_without_norms_is_a_value_like_any_other():
    spec = Decoder(vocab_size=11, dim=8, depth=1, norm=NoNorm(), block=Block(norm=NoNorm(), mixer=Attention(heads=2)))
    assert Spec.from_dict(spec.to_dict()) == spec
    model = spec.build()
    tokens = torch.arange(5)[None]
    x = model.embedding(tokens)
    # Without norms the only path beside attention is the embedding itself.
    for linear in (model.blocks[0].mixer.output,):
        torch.nn.init.zeros_(linear.weight)
    torch.testing.assert_close(model(tokens), model.unembedding(x), rtol=0, atol=0)
