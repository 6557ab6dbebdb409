"""Cross-attention against torch's, and what it may and may not see."""

import pytest
import torch

from paperworks.interpret import record
from paperworks.nn import ALiBi, CrossAttention, Placement


def module(**options):
    torch.manual_seed(0)
    return CrossAttention(heads=4, **options).build(16).double().eval()


def placement(batch, time, context=None, segments=None, context_segments=None):
    return Placement(segments=segments, context=context, context_segments=context_segments).resolve(
        batch, time, torch.device("cpu")
    )


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parity
@torch.no_grad()
def test_cross_attention_is_torchs():
    ours = module(bias=True)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    parts = [ours.query, ours.key, ours.value]
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    x, context = vectors(2, 5, 16), vectors(2, 7, 16)
    real = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with record(ours, ["pattern"]) as seen:
        found = ours(x, placement(2, 5, context, context_segments=real))
    expected, weights = theirs(x, context, context, key_padding_mask=real == 0, average_attn_weights=False)
    assert (found - expected).abs().max() < 1e-12
    assert (seen["pattern"] - weights).abs().max() < 1e-12


@torch.no_grad()
def test_the_context_is_read_once_and_rows_can_be_reordered():
    ours = module(kv_heads=2)
    x, context = vectors(2, 6, 16), vectors(2, 7, 16)
    whole = ours(x, placement(2, 6, context))
    cache = ours.new_cache(2, 6, torch.float64, torch.device("cpu"))
    first = ours(x[:, :2], placement(2, 2, context).at(cache))
    rest = ours(x[:, 2:], placement(2, 4).at(cache))
    assert (torch.cat((first, rest), 1) - whole).abs().max() < 1e-12
    assert cache.bytes() == 2 * 2 * 2 * 7 * 4 * 8
    cache.reorder(torch.tensor([1, 1, 0]))
    assert (ours(x[[1, 1, 0], 2:], placement(3, 4).at(cache)) - whole[[1, 1, 0], 2:]).abs().max() < 1e-12


@torch.no_grad()
def test_packed_rows_read_the_context_of_their_own_segment():
    ours = module()
    one, other, first, second = vectors(1, 3, 16), vectors(1, 2, 16), vectors(1, 4, 16), vectors(1, 5, 16)
    apart = torch.cat((ours(one, placement(1, 3, first)), ours(other, placement(1, 2, second))), 1)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]])
    row = torch.cat((one, other, vectors(1, 1, 16)), 1)
    of_context = torch.tensor([[1] * 4 + [2] * 5])
    packed = ours(row, placement(1, 6, torch.cat((first, second), 1), segments, of_context))
    assert (packed[:, :5] - apart).abs().max() < 1e-12
    assert torch.isfinite(packed).all()  # padding reads something


@torch.no_grad()
def test_a_context_of_another_width_needs_to_be_announced():
    x = vectors(1, 3, 16)
    assert module(context_dim=10)(x, placement(1, 3, vectors(1, 4, 10))).shape == (1, 3, 16)
    with pytest.raises(ValueError, match=r"context must have shape \(1, other time, 16\), got \(1, 4, 10\)"):
        module()(x, placement(1, 3, vectors(1, 4, 10)))


def test_what_cannot_be_asked_of_cross_attention():
    with pytest.raises(ValueError, match="nothing to read: pass Placement"):
        module()(vectors(1, 3, 16), placement(1, 3))
    with pytest.raises(ValueError, match="neither causal=True nor a window"):
        CrossAttention(heads=2, causal=True)
    with pytest.raises(ValueError, match="has no positions"):
        CrossAttention(heads=2, position=ALiBi())
    with pytest.raises(ValueError, match=r"context_segments \(1, 3\) must have the first two sizes of context"):
        placement(1, 3, vectors(1, 4, 16), context_segments=torch.ones(1, 3, dtype=torch.int64))


def test_gradients_are_the_derivatives():
    ours = module()
    x, context = vectors(1, 3, 16).requires_grad_(), vectors(1, 4, 16).requires_grad_()
    torch.autograd.gradcheck(lambda x, context: ours(x, placement(1, 3, context)), (x, context))
