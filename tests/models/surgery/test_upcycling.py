"""A dense model copied into a mixture: the same logits, then experts that come apart."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from paperworks import adapt, api, compress, train
from paperworks.models import Block, Decoder, count_parameters
from paperworks.models.presets.families import llama
from paperworks.models.surgery.upcycling import upcycle
from paperworks.nn import MLP, Attention, Experts, GatedMLP, NoisyTopKRouter, RMSNorm, RoPE, Router, TopKRouter


def spec(feedforward=None, depth=2, **options):
    feedforward = GatedMLP(hidden=12) if feedforward is None else feedforward
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=feedforward)
    return Decoder(vocab_size=11, dim=8, depth=depth, norm=RMSNorm(), block=block, init_std=0.3, **options)


def dense(*arguments, **options):
    torch.manual_seed(0)
    return spec(*arguments, **options).build().double().eval()


def tokens():
    return torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("feedforward", [GatedMLP(hidden=12), MLP(hidden=10)], ids=["gated", "biased"])
@pytest.mark.parametrize("top", [1, 2, 4])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_logits_stay_the_same_whatever_the_router_chooses(feedforward, top, training):
    model = dense(feedforward).train(training)
    router = NoisyTopKRouter() if top == 1 else None  # of one expert a token TopKRouter would learn nothing
    mixture = upcycle(model, 4, top, router=router)
    assert mixture.training == training
    for block in mixture.blocks:
        assert block.feedforward.router.logits.weight.abs().max() > 0 or top == 1
        nn.init.normal_(block.feedforward.router.logits.weight, std=3.0)
    assert (mixture(tokens()) - model(tokens())).abs().max() < 1e-12
    assert mixture.spec.block.feedforward.expert == feedforward


@torch.no_grad()
def test_a_renormalized_router_keeps_the_logits_too():
    model = dense()
    mixture = upcycle(model, 3, router=TopKRouter(softmax="before", renormalize=True))
    assert (mixture(tokens()) - model(tokens())).abs().max() < 1e-12


def test_only_the_named_layers_change_and_parameters_are_counted():
    model = dense(depth=3)
    mixture = upcycle(model, 4, 2, layers=[1])
    kinds = [type(block.feedforward).__name__ for block in mixture.spec.blocks]
    assert kinds == ["GatedMLP", "Experts", "GatedMLP"]
    assert count_parameters(mixture) - count_parameters(model) == 3 * 3 * 8 * 12 + 8 * 4  # three copies and a router
    assert (mixture(tokens()) - model(tokens())).abs().max() < 1e-12
    assert upcycle(mixture, 2, layers=[0]).spec.blocks[1] == mixture.spec.blocks[1]  # the rest may be anything


@pytest.mark.parametrize("tied", [False, True])
def test_the_original_is_left_alone_and_training_makes_experts_differ(tied):
    model = dense(tied=tied)
    model.tokenizer = object()
    model.embedding.weight.requires_grad_(False)
    model.blocks[0].feedforward.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixture = upcycle(model, 4)
    assert mixture.tokenizer is model.tokenizer
    assert (mixture.unembedding.weight is mixture.embedding.weight) == tied
    assert not mixture.embedding.weight.requires_grad
    frozen = [expert.up.weight.requires_grad for expert in mixture.blocks[0].feedforward.experts]
    assert frozen == [False] * 4
    settings = train.Settings(steps=3, lr=1e-2, progress=False, save_every=None)
    loss = train.evaluate(mixture, train.next_token_loss, [tokens()])["loss"]
    train.fit(mixture, train.next_token_loss, [tokens()], settings)
    assert train.evaluate(mixture, train.next_token_loss, [tokens()])["loss"] < loss
    one, other = (expert.down.weight for expert in mixture.blocks[1].feedforward.experts[:2])
    assert (one - other).abs().max() > 1e-3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_routers_are_drawn_and_reproducible():
    model = replace(spec(), init_std=0.05).build().double()  # a plain linear of this width would draw with 0.2
    torch.manual_seed(5)
    one = upcycle(model, 4).blocks[0].feedforward.router.logits.weight
    torch.manual_seed(5)
    assert torch.equal(upcycle(model, 4).blocks[0].feedforward.router.logits.weight, one)
    assert one.dtype == torch.float64
    assert 0.03 < one.std() < 0.08  # 32 numbers
    assert upcycle(model, 4, router=NoisyTopKRouter()).blocks[0].feedforward.router.logits.weight.abs().max() == 0


@dataclass(frozen=True, kw_only=True)
class SomeRouter(Router):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": TopKRouter(softmax="before")}, "sum to less than 1.*use softmax='after'"),
        ({"router": TopKRouter(second="random")}, "use second='top'"),
        ({"router": SomeRouter()}, "SomeRouter is not known"),
        ({"layers": [2]}, "no block 2; this model has blocks 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"top": 5}, "top must be between 1 and count"),
        ({"top": 1}, "the router gets no gradient"),
    ],
)
def test_what_would_change_the_logits_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense(), **{"count": 4} | options)


def test_layers_without_a_dense_part_are_named():
    with pytest.raises(ValueError, match="block 0 is a mixture of experts already"):
        upcycle(dense(Experts(expert=MLP(hidden=4), count=2)), 4)
    mixing = replace(spec().block, feedforward=None)
    with pytest.raises(ValueError, match="block 1 has no feed-forward part"):
        upcycle(replace(spec(), block=(spec().block, mixing)).build(), 4)


@pytest.mark.parametrize("targets", ["attention", "feedforward"])
@pytest.mark.parametrize("wrapping", ["adapter", "format"])
def test_weights_that_are_not_plain_are_refused_with_what_to_do(targets, wrapping):
    model = dense().float()
    if wrapping == "adapter":
        adapt.apply(model, adapt.LoRA(rank=2), targets=targets)
    else:
        compress.apply(model, compress.NF4(block=4), targets=targets)
    with pytest.raises(TypeError, match=r"not those its spec builds, blocks\.0\..*adapt.merge"):
        upcycle(model, 4)


@pytest.mark.parity
@torch.no_grad()
def test_an_upcycled_llama_is_a_mixtral_to_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = llama(16, 2, 2, 24, kv_heads=1, vocab_size=11, context=64, eps=1e-5).build().eval()
    api.export(upcycle(model, 4), tmp_path, layout="huggingface")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert (theirs(tokens()).logits - model(tokens())).abs().max() < 1e-6
