"""The block's arrangements against torch's encoder layer and against what they must do without branches."""

import pytest
import torch
from torch import nn

from paperworks.models import Block, NoResidual, Parallel, PostNorm, PreNorm, Sandwich
from paperworks.nn import MLP, Attention, LayerNorm, Placement

DIM, HEADS, TIME = 16, 4, 9


KINDS = {"pre": PreNorm(), "post": PostNorm(), "parallel": Parallel(), "sandwich": Sandwich(), "plain": NoResidual()}


def block(arrangement, **options):
    torch.manual_seed(0)
    spec = Block(
        norm=LayerNorm(),
        mixer=Attention(heads=HEADS, causal=False, bias=True),
        feedforward=MLP(hidden=24, activation="relu"),
        arrangement=KINDS.get(arrangement, arrangement),
        **options,
    )
    built = spec.build(DIM).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


def run(module, x):
    return module(x, Placement().resolve(*x.shape[:2], x.device))


def vectors():
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, TIME, DIM, dtype=torch.float64, generator=draws).requires_grad_()


@pytest.mark.parity
@pytest.mark.parametrize("arrangement", ["pre", "post"])
def test_pre_and_post_norm_equal_torchs_encoder_layer_with_gradients(arrangement):
    ours, x = block(arrangement), vectors()
    theirs = nn.TransformerEncoderLayer(
        DIM, HEADS, 24, dropout=0.0, batch_first=True, norm_first=arrangement == "pre", dtype=torch.float64
    )
    mixer = ours.mixer
    pairs = [
        (theirs.self_attn.in_proj_weight, torch.cat([p.weight for p in (mixer.query, mixer.key, mixer.value)])),
        (theirs.self_attn.in_proj_bias, torch.cat([p.bias for p in (mixer.query, mixer.key, mixer.value)])),
    ]
    for a, b in (
        (theirs.self_attn.out_proj, mixer.output),
        (theirs.linear1, ours.feedforward.up),
        (theirs.linear2, ours.feedforward.down),
        (theirs.norm1, ours.mixer_norm),
        (theirs.norm2, ours.feedforward_norm),
    ):
        pairs += [(a.weight, b.weight), (a.bias, b.bias)]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    outs = run(ours, x), theirs(x)
    assert (outs[0] - outs[1]).abs().max() < 1e-12
    probe = torch.randn_like(x)
    slopes = [torch.autograd.grad((out * probe).sum(), x)[0] for out in outs]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-12


def test_without_branches_pre_norm_is_the_identity_and_post_norm_the_norm():
    outs = {}
    for arrangement in ("pre", "post"):
        module = block(arrangement)
        for linear in (module.mixer.output, module.feedforward.down):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        outs[arrangement] = run(module, vectors())
        norms = module.mixer_norm, module.feedforward_norm
    assert torch.equal(outs["pre"], vectors())
    assert torch.equal(outs["post"], norms[1](norms[0](vectors())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrangement": "middle"}, "Block.arrangement must be"),
        ({"arrangement": "pre", "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_arrangements_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        block(**options)
