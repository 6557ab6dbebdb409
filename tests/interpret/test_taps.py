import weakref

import pytest
import torch
from torch import nn

import paperworks as pw
from paperworks import interpret
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, Placement, RMSNorm, RoPE
from paperworks.nn.attention import attention
from tests.parity.families import oracle


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    mixer = Attention(heads=4, kv_heads=2, position=RoPE())
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    spec = Decoder(vocab_size=31, dim=16, depth=3, block=block, norm=RMSNorm(), init_std=0.3)
    return spec.build().eval()


TOKENS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))
EVERYWHERE = ["embedding", "blocks.*", "norm"]


def test_recording_changes_no_bit_of_the_output(model):
    before = model(TOKENS)
    with interpret.record(model, EVERYWHERE) as seen:
        assert torch.equal(model(TOKENS), before)
    assert "blocks.1.mixer.pattern" in seen
    assert torch.equal(model(TOKENS), before)


def test_the_taps_have_their_published_names_and_shapes(model):
    with interpret.record(model, EVERYWHERE) as seen:
        model(TOKENS)
    assert seen["blocks.1"].shape == (2, 7, 16)
    assert seen["blocks.1.mixer"].shape == (2, 7, 16)
    assert seen["blocks.1.mixer.pattern"].shape == (2, 4, 7, 7)
    assert seen["blocks.1.mixer.heads"].shape == (2, 7, 4, 4)
    assert seen["blocks.1.feedforward.hidden"].shape == (2, 7, 24)
    residual = seen["blocks.0"] + seen["blocks.1.mixer"] + seen["blocks.1.feedforward"]
    assert (residual - seen["blocks.1"]).abs().max() < 1e-5


def test_recorded_patterns_are_the_ones_the_fused_kernel_used(model):
    with interpret.record(model, ["blocks.*.mixer.pattern", "blocks.*.mixer.heads", "blocks.*.mixer.value"]) as seen:
        model(TOKENS)
    pattern = seen["blocks.2.mixer.pattern"]
    assert (pattern.sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(pattern.triu(1), torch.zeros_like(pattern))
    values = seen["blocks.2.mixer.value"].unflatten(-1, (2, 4)).repeat_interleave(2, 2)
    expected = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    assert (expected - seen["blocks.2.mixer.heads"]).abs().max() < 1e-5


@pytest.mark.parity
def test_patterns_equal_transformers_eager_attention():
    from paperworks.checkpoints import from_transformers

    theirs = oracle("mistral")
    ours = from_transformers(theirs)
    tokens = torch.randint(1, 97, (2, 12))
    with interpret.record(ours, "*.mixer.pattern") as seen, torch.no_grad():
        ours(tokens)
        expected = theirs(tokens, output_attentions=True).attentions
    for layer, pattern in enumerate(expected):
        assert (seen[f"blocks.{layer}.mixer.pattern"] - pattern).abs().max() < 1e-5


def test_identity_edits_change_no_bit(model):
    before = model(TOKENS)
    with interpret.edit(model, dict.fromkeys(EVERYWHERE, lambda x: x)):
        assert torch.equal(model(TOKENS), before)


def test_an_edited_pattern_replaces_the_fused_one(model):
    with interpret.edit(model, {"blocks.*.mixer.pattern": lambda p: torch.eye(p.shape[-1]).expand_as(p)}):
        alone = model(TOKENS)
    for index in range(TOKENS.shape[1]):  # each token saw only itself
        single = model(TOKENS[:, index : index + 1], Placement(positions=torch.tensor([[index]])))
        assert (single[:, 0] - alone[:, index]).abs().max() < 1e-5
    with interpret.edit(model, {"blocks.*.mixer.pattern": lambda p: p.clone()}):
        assert (model(TOKENS) - model(TOKENS)).abs().max() < 1e-5


def test_edits_of_the_stream_act_on_everything_after(model):
    with (
        interpret.edit(model, {"blocks.1": lambda x: x + 1}),
        interpret.record(model, "blocks.{0,1,2}") as seen,
    ):
        model(TOKENS)
    with interpret.record(model, "blocks.{0,1,2}") as plain:
        model(TOKENS)
    assert torch.equal(seen["blocks.0"], plain["blocks.0"])
    assert torch.allclose(seen["blocks.1"], plain["blocks.1"] + 1)
    assert not torch.allclose(seen["blocks.2"], plain["blocks.2"] + 1)


def test_hooks_are_gone_after_an_exception(model):
    before = model(TOKENS)
    with pytest.raises(RuntimeError), interpret.edit(model, {"blocks.0": lambda x: x * 0}):
        raise RuntimeError
    assert torch.equal(model(TOKENS), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_edits_work_inside_generate_with_its_cache(model):
    plain = pw.generate(model, TOKENS, max_new_tokens=5, temperature=0.0)
    with interpret.edit(model, {"blocks.1": lambda x: x + 3 * torch.arange(16).sin()}):
        steered = pw.generate(model, TOKENS, max_new_tokens=5, temperature=0.0)
        for step in range(5):  # the same as full forward passes under the edit
            so_far = torch.cat((TOKENS, steered[:, :step]), 1)
            assert torch.equal(model(so_far)[:, -1].argmax(-1), steered[:, step])
    assert not torch.equal(plain, steered)


def test_every_forward_pass_is_kept(model):
    with interpret.record(model, "blocks.0") as seen:
        model(TOKENS[:, :3])
        model(TOKENS)
    assert [value.shape[1] for value in seen.all["blocks.0"]] == [3, 7]


def test_gradients_flow_through_a_record_that_is_not_detached(model):
    with interpret.record(model, "blocks.0", detach=False) as seen:
        out = model(TOKENS)
    (gradient,) = torch.autograd.grad(out.sum(), seen["blocks.0"])
    assert (gradient != 0).any()


def test_other_libraries_modules_can_be_recorded_and_edited():
    theirs = oracle("llama2")
    with interpret.record(theirs, "model.layers.*") as seen, torch.no_grad():
        hidden = theirs(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(seen["model.layers.0"], hidden[1])
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with interpret.edit(plain, {"1": lambda x: x * 0}):
        assert torch.equal(plain(torch.ones(1, 3)), torch.zeros(1, 3))


def test_wrong_targets_and_edits_are_refused(model):
    with pytest.raises(ValueError, match=r"Near misses: blocks\.\*\.mixer"), interpret.record(model, "blocks.*.mixr"):
        pass
    for bad, message in (
        (lambda x: None, "returned NoneType"),
        (lambda x: x[:, :1], r"it must keep torch.float32 \(2, 7, 16\)"),
        (lambda x: x.double(), "returned torch.float64"),
    ):
        with pytest.raises(ValueError, match=message), interpret.edit(model, {"blocks.0": bad}):
            model(TOKENS)
    with interpret.record(model, "blocks.0") as seen, pytest.raises(KeyError, match="did a forward pass run"):
        seen["blocks.0"]


def test_recording_one_tap_of_thirty_layers_keeps_that_tap_alone():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2), feedforward=GatedMLP(hidden=8))
    deep = Decoder(vocab_size=31, dim=8, depth=30, block=block, norm=RMSNorm()).build().eval()
    alive, hooks = [], []
    for module in deep.modules():
        hooks.append(module.register_forward_hook(lambda m, i, output: alive.append(weakref.ref(output))))
    with interpret.record(deep, "blocks.12") as seen:
        logits = deep(TOKENS)
    for hook in hooks:
        hook.remove()
    assert len(alive) > 300
    del logits  # with gradients on: the record must not hold the graph either
    assert [reference for reference in alive if reference() is not None] == []
    assert sum(value.untyped_storage().nbytes() for values in seen.all.values() for value in values) == 2 * 7 * 8 * 4
    assert seen["blocks.12"].grad_fn is None


def test_a_tap_that_nobody_listens_to_computes_no_pattern(model, monkeypatch):
    calls = []
    plain = attention.pattern
    monkeypatch.setattr(attention, "pattern", lambda inputs: calls.append(1) or plain(inputs))
    model(TOKENS)
    assert calls == []
    with interpret.record(model, "blocks.1.mixer.pattern"):
        model(TOKENS)
    assert calls == [1]


def test_a_record_is_a_copy_wherever_it_goes():
    plain = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    for place in (None, "cpu"):
        x = -torch.ones(2, 3)
        with interpret.record(plain, "0", to=place) as seen:
            plain(x)
        assert torch.equal(seen["0"], -torch.ones(2, 3))
        assert torch.equal(x, torch.zeros(2, 3))  # the in-place ReLU reached the input, not the record


def test_not_a_number_is_found_with_its_tap_its_pass_and_its_rows(model):
    poison = {"blocks.1.mixer": lambda x: x.index_fill(0, torch.tensor([1]), float("nan"))}
    where = r"blocks\.1\.mixer .* 112 NaN and 0 infinite .* pass 1 .*rows 1;"
    with (
        interpret.edit(model, poison),
        interpret.record(model, "blocks.*", finite=True),
        pytest.raises(FloatingPointError, match=where),
    ):
        model(TOKENS)
    with interpret.record(model, "blocks.*", finite=True) as seen:
        model(TOKENS)
    assert torch.isfinite(seen["blocks.2"]).all()
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_edit_raises_and_after_a_target_is_refused(model):
    def fail(x):
        raise RuntimeError("inside the edit")

    with pytest.raises(RuntimeError, match="inside the edit"), interpret.edit(model, {"blocks.0": fail}):
        model(TOKENS)
    assert not any(module._forward_hooks for module in model.modules())
    half_right = {"blocks.0": lambda x: x, "nowhere": lambda x: x}
    with pytest.raises(ValueError, match="matches no module"), interpret.edit(model, half_right):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_a_record_inside_an_edit_sees_the_edited_value_and_one_outside_the_value_before(model):
    with (
        interpret.record(model, "blocks.1") as outside,
        interpret.edit(model, {"blocks.1": lambda x: x * 0}),
        interpret.record(model, "blocks.1") as inside,
    ):
        model(TOKENS)
    assert outside["blocks.1"].abs().max() > 0
    assert torch.equal(inside["blocks.1"], torch.zeros_like(outside["blocks.1"]))


def test_an_edited_pattern_works_inside_generate_with_its_cache(model):
    look_at_self = {"blocks.*.mixer.pattern": lambda p: torch.zeros_like(p).index_fill(-1, torch.tensor([0]), 1.0)}
    with interpret.edit(model, look_at_self):
        steered = pw.generate(model, TOKENS, max_new_tokens=4, temperature=0.0)
        for step in range(4):
            so_far = torch.cat((TOKENS, steered[:, :step]), 1)
            assert torch.equal(model(so_far)[:, -1].argmax(-1), steered[:, step])


@pytest.mark.parity
def test_per_head_results_equal_those_of_transformers():
    from paperworks.checkpoints import from_transformers

    theirs = oracle("llama2")
    ours = from_transformers(theirs)
    inputs = {}
    for index, layer in enumerate(theirs.model.layers):  # the input of o_proj: the heads side by side
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, given, index=index: inputs.__setitem__(index, given[0].detach())
        )
    with interpret.record(ours, "*.mixer.heads") as seen, torch.no_grad():
        ours(TOKENS)
        theirs(TOKENS)
    for index, expected in inputs.items():
        assert (seen[f"blocks.{index}.mixer.heads"].flatten(2) - expected).abs().max() < 1e-5  # float32
