"""Mixtures of experts against a plain loop, transformers' layers, and what their papers say of the losses."""

import json
import math

import pytest
import torch

from paperworks.models import Block, Decoder
from paperworks.nn import (
    MLP,
    Attention,
    Experts,
    GatedMLP,
    NoisyTopKRouter,
    Placement,
    RMSNorm,
    Spec,
    TopKRouter,
    auxiliary,
)
from paperworks.nn.feedforward.experts.mixture import within_capacity
from paperworks.nn.feedforward.experts.routers import balance_loss, smooth_load, squared_variation, z_loss

SWITCH = TopKRouter(softmax="before", balance=0.01)


def module(seed=0, dim=8, **options):
    torch.manual_seed(seed)
    spec = Experts(**{"expert": GatedMLP(hidden=12), "count": 4, "top": 2} | options)
    return spec.build(dim).double()


def vectors(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loop(experts, x):
    """One token and one expert at a time."""
    flat = x.flatten(0, 1)
    routing = experts.router(flat)
    rows = []
    for token, chosen, weights in zip(flat, routing.experts.tolist(), routing.weights, strict=True):
        row = sum(weight * experts.experts[index](token) for index, weight in zip(chosen, weights, strict=True))
        rows.append(row + sum(expert(token) for expert in experts.shared))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"top": 4}, {"top": 1, "router": SWITCH}, {"shared": 2}, {"top": 3, "router": TopKRouter(softmax="before")}],
    ids=["two", "all", "switch", "shared", "before"],
)
def test_sorted_dispatch_equals_the_loop_with_its_gradients(options):
    ours, theirs = module(**options), module(**options)
    x, y = vectors(2, 7, 8).requires_grad_(), vectors(2, 7, 8).requires_grad_()
    out, expected = ours(x), by_loop(theirs, y)
    assert (out - expected).abs().max() < 1e-14
    upstream = vectors(2, 7, 8, seed=5)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-13
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # an expert that no token chose has a gradient of zero, not none: DDP and our own sums need one
        assert (one.grad - (0 if other.grad is None else other.grad)).abs().max() < 1e-13, name


def test_all_experts_without_a_choice_are_a_dense_mixture():
    experts, x = module(top=4), vectors(1, 5, 8)
    weights = experts.router.logits(x).softmax(-1)
    dense = sum(weights[..., index, None] * expert(x) for index, expert in enumerate(experts.experts))
    assert (experts(x) - dense).abs().max() < 1e-14


def test_weights_over_the_chosen_equal_the_renormalized_softmax_over_all():
    after = module()
    before = module(router=TopKRouter(softmax="before", renormalize=True))
    x = vectors(2, 7, 8)
    assert (after(x) - before(x)).abs().max() < 1e-14


def test_equal_experts_are_one_expert():
    """So a dense layer, copied eight times, is a mixture with the same outputs (upcycling)."""
    experts = module(count=8)
    for expert in experts.experts[1:]:
        expert.load_state_dict(experts.experts[0].state_dict())
    x = vectors(2, 7, 8)
    assert (experts(x) - experts.experts[0](x)).abs().max() < 1e-14


@pytest.mark.parity
@torch.no_grad()
def test_it_is_mixtrals_layer():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config).eval()
    ours = module(router=TopKRouter(balance=1.0)).float().eval()
    theirs.gate.weight.copy_(ours.router.logits.weight)
    for index, expert in enumerate(ours.experts):
        theirs.experts.gate_up_proj[index] = torch.cat((expert.gate.weight, expert.up.weight))
        theirs.experts.down_proj[index] = expert.down.weight
    x = torch.randn(2, 7, 8)
    with auxiliary.collecting() as collected:
        found = ours(x)
    assert (found - theirs(x)).abs().max() < 1e-6
    logits = ours.router.logits(x.flatten(0, 1))
    # theirs adds the k choices up, ours is their mean: 1 when routing is uniform, whatever k
    assert collected.total() * 2 == pytest.approx(float(load_balancing_loss_func((logits,), 4, 2)), rel=1e-5)


@pytest.mark.parity
@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_it_is_switchs_layer_with_its_capacity(factor):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    capacity = math.floor(factor * 16 / 4)
    config = SwitchTransformersConfig(d_model=8, d_ff=12, num_experts=4, expert_capacity=capacity)
    theirs = SwitchTransformersSparseMLP(config).eval()
    expert = MLP(hidden=12, activation="relu", bias=False)
    ours = module(expert=expert, top=1, router=SWITCH, capacity=factor).float().eval()
    theirs.router.classifier.weight.copy_(ours.router.logits.weight)
    for index, each in enumerate(ours.experts):
        theirs.experts[f"expert_{index}"].wi.weight.copy_(each.up.weight)
        theirs.experts[f"expert_{index}"].wo.weight.copy_(each.down.weight)
    x = torch.randn(1, 16, 8)  # theirs counts by sequence, ours by call
    found = ours(x)
    assert (found - theirs(x)).abs().max() < 1e-6
    assert bool((found == 0).all(-1).any()) == (factor < 2)  # tokens beyond capacity get nothing here


@pytest.mark.parity
@torch.no_grad()
def test_capacity_in_tokens_counts_within_each_sequence_as_transformers_does():
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    theirs = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(d_model=8, d_ff=12, num_experts=4, expert_capacity=3)
    ).eval()
    expert = MLP(hidden=12, activation="relu", bias=False)
    ours = module(expert=expert, top=1, router=SWITCH, capacity_tokens=3).float().eval()
    theirs.router.classifier.weight.copy_(ours.router.logits.weight)
    for index, each in enumerate(ours.experts):
        theirs.experts[f"expert_{index}"].wi.weight.copy_(each.up.weight)
        theirs.experts[f"expert_{index}"].wo.weight.copy_(each.down.weight)
    x = torch.randn(3, 16, 8)
    found = ours(x)
    assert (found - theirs(x)).abs().max() < 1e-6  # float32 products in another order
    assert int((found == 0).all(-1).sum()) >= 3 * 4  # 4 experts x 3 take at most 12 of the 16 tokens of a sequence


def test_two_kinds_of_capacity_are_refused():
    with pytest.raises(ValueError, match="give one: a factor, or a count of tokens"):
        module(capacity=1.0, capacity_tokens=3)


def test_capacity_counts_every_choice_and_is_rounded_down():
    experts, x = module(capacity=1.0), vectors(1, 1, 8).expand(1, 7, 8)  # all tokens choose the same two of four
    served = (experts(x)[0] != 0).any(-1)
    assert served.tolist() == [True] * 3 + [False] * 4  # floor(7 tokens * 2 choices / 4 experts)


def test_capacity_serves_first_choices_first_and_then_in_order():
    experts = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    assert within_capacity(experts, 2, 2).tolist() == [[True, True], [True, False], [False, False], [True, False]]
    assert within_capacity(experts, 2, 4).all()
    assert not within_capacity(experts, 2, 0).any()


def test_the_balance_loss_is_one_when_uniform_and_n_when_collapsed():
    uniform = torch.full((8, 4), 0.25)
    assert balance_loss(uniform, torch.arange(8)[:, None] % 4).item() == pytest.approx(1.0)
    sure = torch.eye(4)[torch.zeros(8, dtype=torch.int64)]
    assert balance_loss(sure, torch.zeros(8, 1, dtype=torch.int64)).item() == pytest.approx(4.0)


def test_the_balance_loss_has_the_gradient_of_its_formula_only():
    """f is counted, so only P carries a gradient: N f_i / tokens."""
    probabilities = vectors(6, 4).softmax(-1).requires_grad_()
    chosen = probabilities.argmax(-1, keepdim=True)
    balance_loss(probabilities, chosen).backward()
    share = torch.bincount(chosen.flatten(), minlength=4).double() / 6
    assert (probabilities.grad - 4 * share / 6).abs().max() < 1e-15


def test_the_z_loss_has_its_gradient():
    logits = vectors(5, 4).requires_grad_()
    z_loss(logits).backward()
    lse = logits.logsumexp(-1, keepdim=True)
    assert (logits.grad - 2 * lse * logits.softmax(-1) / 5).abs().max() < 1e-15


def test_padding_counts_for_no_loss():
    router = TopKRouter(balance=1.0, z=1.0)
    block = Block(
        norm=RMSNorm(), mixer=Attention(heads=2), feedforward=Experts(expert=MLP(hidden=8), count=4, router=router)
    )
    torch.manual_seed(0)
    model = Decoder(vocab_size=9, dim=8, depth=1, block=block, norm=None, init_std=0.5).build().double()
    tokens = torch.randint(1, 9, (1, 6))

    def losses(tokens, segments=None):
        with auxiliary.collecting() as collected:
            model(tokens, Placement(segments=segments))
        return {name: float(value) for name, value in collected.sums().items()}

    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), tokens), 1)
    segments = torch.cat((torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(tokens)), 1)
    assert losses(padded, segments) == pytest.approx(losses(tokens), rel=1e-12)
    assert losses(padded) != pytest.approx(losses(tokens), rel=1e-3)


def test_noisy_gating_begins_uniform_and_keeps_k():
    experts = module(router=NoisyTopKRouter(), count=8, top=3)
    experts.train()
    torch.manual_seed(0)
    routing = experts.router(vectors(4000, 8))
    assert routing.experts.shape == (4000, 3)
    assert (routing.weights.sum(-1) - 1).abs().max() < 1e-12
    load = torch.bincount(routing.experts.flatten(), minlength=8) / 4000
    assert (load - 3 / 8).abs().max() < 0.04  # five standard deviations of a share of 4,000
    experts.eval()
    assert torch.equal(experts.router(vectors(9, 8)).experts, experts.router(vectors(9, 8)).experts)  # no noise


def test_the_smooth_load_is_the_frequency_of_being_chosen():
    """The catalogue: within 0.002 at 200,000 draws, each with fresh noise for one expert and the others' kept."""
    clean, spread = vectors(1, 5, seed=3), vectors(1, 5, seed=4).exp()
    draws = torch.Generator().manual_seed(0)
    noisy = clean + torch.randn(1, 5, dtype=torch.float64, generator=draws) * spread
    found = smooth_load(clean, spread, noisy, 2)[0]
    for index in range(5):
        fresh = noisy.repeat(200_000, 1)
        fresh[:, index] = (
            clean[0, index] + torch.randn(200_000, dtype=torch.float64, generator=draws) * spread[0, index]
        )
        chosen = (fresh.topk(2, -1).indices == index).any(-1).double().mean()
        assert abs(float(chosen) - float(found[index])) < 0.004  # three standard deviations


def test_importance_and_load_are_handed_on_with_gradients():
    experts = module(router=NoisyTopKRouter(importance=0.5, load=0.25), count=8).train()
    torch.nn.init.normal_(experts.router.logits.weight)
    torch.nn.init.normal_(experts.router.noise.weight)
    with auxiliary.collecting() as collected:
        experts(vectors(2, 9, 8))
    assert set(collected.by_name) == {"importance", "load"}
    collected.total().backward()
    assert experts.router.logits.weight.grad.abs().max() > 0
    assert experts.router.noise.weight.grad.abs().max() > 0
    values = torch.tensor([1.0, 2, 3, 6])
    assert squared_variation(values).item() == pytest.approx(3.5 / 9)


def test_gshards_second_expert_is_taken_in_proportion_to_its_weight():
    experts = module(router=TopKRouter(softmax="before", second="random")).train()
    x = vectors(1, 8).expand(20_000, 8)
    torch.manual_seed(0)
    weights = experts.router(x).weights
    share = (weights[:, 1] > 0).double().mean()
    assert float(share) == pytest.approx(min(1.0, 2 * weights[:, 1].max().item()), abs=0.02)
    assert (weights[:, 0] > 0).all()


def test_jitter_moves_only_the_choice_and_only_in_training():
    experts = module(top=1, router=TopKRouter(softmax="before", jitter=0.5))
    x = vectors(2, 7, 8)
    assert torch.equal(experts.eval()(x), experts(x))
    assert not torch.equal(experts.train()(x), experts(x))


@torch.no_grad()
def test_a_model_of_experts_decodes_compiles_to_json_and_halves():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2), feedforward=Experts(expert=MLP(hidden=8), count=4))
    spec = Decoder(vocab_size=9, dim=8, depth=2, block=block, norm=RMSNorm(), init_std=0.3)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    model = spec.build().double().eval()
    tokens = torch.randint(0, 9, (2, 7))
    cache = model.new_cache(2, 7)
    parts = [model(tokens[:, :3], Placement(cache=cache)), model(tokens[:, 3:], Placement(cache=cache))]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-12
    assert model.bfloat16()(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2, "top": 3}, r"Experts\.top must be between 1 and count \(2\), got 3"),
        ({"count": 0, "top": 1}, r"Experts\.count must be at least 1"),
        ({"capacity": 0.0}, "capacity must be positive"),
        ({"capacity_evaluation": 2.0}, "needs a capacity in training too"),
        ({"shared": -1}, "shared must be at least 0"),
        ({"top": 1}, "the router gets no gradient: use TopKRouter"),
        ({"expert": Experts(expert=MLP(hidden=2), count=2)}, "itself a mixture"),
        ({"router": {"jitter": 1.0}}, "jitter must be below 1"),
        ({"router": {"balance": -1.0}}, "balance must be at least 0"),
    ],
)
def test_mixtures_that_cannot_be_say_why(options, message):
    with pytest.raises(ValueError, match=message):
        module(**{k: TopKRouter(**v) if k == "router" else v for k, v in options.items()})
