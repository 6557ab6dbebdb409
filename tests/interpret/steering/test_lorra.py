import copy

import pytest
import torch

from paperworks import adapt, interpret
from paperworks.interpret.steering.lorra import Lorra, LorraBatch, lorra_loss
from tests.interpret.test_taps import model as fixture


def batch(response=None):
    torch.manual_seed(3)
    text = torch.randint(1, 10, (3, 5))
    positive, negative = (torch.cat([torch.tensor([[a, b]] * 3), text], 1) for a, b in ((1, 2), (3, 4)))
    return LorraBatch(text, positive, negative, torch.ones(3, 4, dtype=torch.bool) if response is None else response)


def adapted(rank=2):
    model = fixture.__wrapped__()
    adapt.apply(model, adapt.LoRA(rank=rank, alpha=16), targets="blocks.*.mixer.{query,value}")
    return model


def learning_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_the_loss_is_the_unsquared_distance_averaged_over_masked_places_too():
    states = {name: torch.randn(2, 3, 4, dtype=torch.float64) for name in "ab"}
    targets = {name: torch.randn(2, 3, 4, dtype=torch.float64) for name in "ab"}
    response = torch.tensor([[True, False, True], [False, False, True]])
    naive = 0.0
    for name in "ab":
        for row in range(2):
            for place in range(3):
                if response[row, place]:
                    naive += float((states[name][row, place] - targets[name][row, place]).pow(2).sum() ** 0.5) / 12
    assert abs(float(lorra_loss(states, targets, response)) - naive) < 1e-12


def test_on_its_target_the_loss_is_zero_with_a_finite_gradient():
    state = torch.randn(1, 2, 4, requires_grad=True)
    loss = lorra_loss({"a": state}, {"a": state.detach()}, torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert torch.equal(state.grad, torch.zeros_like(state))


def test_without_a_push_a_fresh_adapter_has_no_loss():
    # LoRA's second matrix starts at zero, so the adapted model is the frozen one.
    loss = Lorra(["blocks.1"], alpha=0.0, disabled=adapt.disabled)
    assert loss(adapted(), batch()) == 0


def test_targets_are_the_frozen_models_even_when_the_adapter_has_learned():
    model = adapted()
    frozen = fixture.__wrapped__()
    with torch.no_grad():
        for parameter in learning_parameters(model):
            parameter.normal_()
    made = batch()
    found = Lorra(["blocks.1"], alpha=2.0, disabled=adapt.disabled).targets(model, made)
    states = []
    for tokens in (made.plain, made.positive, made.negative):
        with interpret.record(frozen, "blocks.1") as seen:
            frozen(tokens)
        states.append(seen["blocks.1"][:, -4:])
    assert torch.allclose(found["blocks.1"], states[0] + 2.0 * (states[1] - states[2]), atol=1e-5)


def test_a_reading_vector_joins_the_target():
    model, made = adapted(), batch()
    reading = interpret.ControlVector({"blocks.1": torch.randn(model.spec.dim)})
    plain = Lorra(["blocks.1"], alpha=0.0, disabled=adapt.disabled).targets(model, made)
    moved = Lorra(["blocks.1"], 0.0, 3.0, reading, disabled=adapt.disabled).targets(model, made)
    assert torch.allclose(moved["blocks.1"], plain["blocks.1"] + 3.0 * reading.directions["blocks.1"], atol=1e-6)
    with pytest.raises(ValueError, match=r"no reading vector for blocks\.0"):
        Lorra(["blocks.0"], 0.0, 3.0, reading, disabled=adapt.disabled)


def test_only_adapters_at_or_before_the_target_layer_learn():
    model = adapted()
    Lorra(["blocks.0"], alpha=2.0, disabled=adapt.disabled)(model, batch()).backward()
    learning = {
        name.split(".")[1]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    assert learning == {"0"}


def test_masked_tokens_teach_nothing():
    model = adapted()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    loss = Lorra(["blocks.1"], alpha=2.0, disabled=adapt.disabled)(model, batch(nothing))
    loss.backward()
    assert loss == 0
    assert not any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_training_moves_towards_the_target_and_merges_into_the_weights():
    model, made = adapted(8), batch()
    loss = Lorra(["blocks.1"], alpha=1.0, disabled=adapt.disabled)
    optimizer = torch.optim.AdamW(learning_parameters(model), lr=1e-2)
    first = float(loss(model, made).detach())
    for _ in range(30):
        optimizer.zero_grad()
        now = loss(model, made)
        now.backward()
        optimizer.step()
    assert float(now.detach()) < 0.8 * first
    merged = copy.deepcopy(model)
    adapt.merge(merged)
    assert torch.allclose(merged(made.plain), model(made.plain), atol=1e-4)


def test_bad_input_is_refused():
    made = batch()
    with pytest.raises(ValueError, match="at least one target layer"):
        Lorra([], disabled=adapt.disabled)
    with pytest.raises(ValueError, match=r"LorraBatch.plain"):
        LorraBatch(made.plain[:, :2], made.positive, made.negative, made.response)
    with pytest.raises(ValueError, match="same layers"):
        lorra_loss({"a": torch.ones(1, 1, 1)}, {"b": torch.ones(1, 1, 1)}, torch.ones(1, 1, dtype=torch.bool))
