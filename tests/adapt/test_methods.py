"""DoRA, IA3 and PiSSA: their equations, peft's numbers and files, merging, and how several compose."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks import adapt, compress
from paperworks.core.linear import weight_of
from tests.parity.families import oracle

TOKENS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
METHODS = {
    "DoRA": adapt.DoRA(rank=2, alpha=6),
    "IA3": adapt.IA3(feedforward=("2",)),
    "PiSSA": adapt.PiSSA(rank=2, alpha=6),
    "LoRA": adapt.LoRA(rank=2, alpha=6),
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def shaken(model, seed=1):
    """The model with its adapters' trained numbers moved."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))
    return model


def put(method, name="default", model=None, seed=1):
    model = network() if model is None else model
    torch.manual_seed(seed)
    adapt.apply(model, METHODS[method], ["0", "2"], name)
    return shaken(model, seed)


def naive(method, layer, weight, bias, x):
    """The paper's equation, written down; `weight` is the base's before the adapter."""
    delta, inputs = layer.delta, layer.in_features
    if method == "IA3":
        return F.linear(x * delta.scale, weight, bias) if inputs == 16 else delta.scale * F.linear(x, weight, bias)
    low = delta.scale * delta.up @ delta.down
    if method == "LoRA":
        return F.linear(x, weight + low, bias)
    if method == "DoRA":
        norm = (weight + low).square().sum(1, keepdim=True).sqrt().detach()
        return F.linear(x, delta.magnitude[:, None] * (weight + low) / norm, bias)
    u, s, vh = torch.linalg.svd(weight)
    principal = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    return F.linear(x, weight - principal + low, bias)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_gradients_and_effective_weights_equal_the_equation(method):
    base, model = network(), put(method)
    for place, size in ((0, 12), (2, 16)):
        layer, plain = model[place], base[place]
        x = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
        mine, other = layer(x), naive(method, layer, plain.weight, plain.bias, x)
        assert (mine - other).abs().max() < 1e-12
        found, wanted = (
            torch.autograd.grad(out.square().sum(), [x, *layer.delta.parameters()]) for out in (mine, other)
        )
        for one, two in zip(found, wanted, strict=True):
            assert two.abs().max() > 0
            assert (one - two).abs().max() < 1e-11 * max(1, two.abs().max())
        assert (F.linear(x, layer.weight, layer.bias) - mine).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_at_first_and_only_the_methods_parameters_are_trained(method):
    model, x = network(), torch.randn(3, 12, dtype=torch.float64)
    before = model(x)
    adapt.apply(model, METHODS[method], ["0", "2"])
    assert (model(x) - before).abs().max() < 1e-12
    counts = {"LoRA": 2 * (28 + 24), "PiSSA": 2 * (28 + 24), "DoRA": 2 * (28 + 24) + 24, "IA3": 16 + 16}
    assert adapt.trainable_parameters(model) == counts[method]


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_and_removed_is_the_base(method):
    base, model, x = network(), put(method), torch.randn(3, 12, dtype=torch.float64)
    wanted = model(x)
    assert (wanted - base(x)).abs().max() > 1e-2
    merged = adapt.merge(copy.deepcopy(model))
    assert not adapt.adapted(merged)
    assert (merged(x) - wanted).abs().max() < 1e-12
    assert not merged[0].weight.requires_grad
    with adapt.disabled(model):
        assert (model(x) - base(x)).abs().max() < 1e-12
    adapt.remove(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.state_dict().items())


@pytest.mark.parametrize("one", METHODS)
@pytest.mark.parametrize("other", METHODS)
def test_weights_add_each_methods_change_of_the_base(one, other):
    base, x = network(), torch.randn(3, 12, dtype=torch.float64)
    alone = {name: put(method, seed=seed) for seed, (name, method) in enumerate((("a", one), ("b", other)))}
    model = put(other, "b", put(one, "a", seed=0), seed=1)
    adapt.use(model, {"a": 0.7, "b": 0.3})
    outputs = {name: each[0](x) - base[0](x) for name, each in alone.items()}
    wanted = base[0](x) + 0.7 * outputs["a"] + 0.3 * outputs["b"]
    assert (model[0](x) - wanted).abs().max() < 1e-12
    for name in ("a", "b"):
        assert (adapt.use(model, name)(x) - alone[name](x)).abs().max() < 1e-12
    adapt.use(model, {"a": 0.7, "b": 0.3})
    before = model(x)
    kept = adapt.merge(adapt.use(copy.deepcopy(model), {"a": 0.5}))
    assert adapt.names(kept) == ["b"]
    assert (kept[0](x) - base[0](x) - 0.5 * outputs["a"]).abs().max() < 1e-12
    assert (adapt.merge(model)(x) - before).abs().max() < 1e-12


def test_pissa_is_removed_in_any_order_and_gives_back_the_very_parameter():
    model = network()
    held = model[0].weight
    for name in ("a", "b"):
        put("PiSSA", name, model)
    assert model[0].base.weight is not held
    adapt.remove(model, "a")
    assert (weight_of(model[0].base) + model[0].delta.removed() - held).abs().max() < 1e-12
    adapt.remove(model, "b")
    assert model[0].weight is held


def test_pissa_on_four_bits_stores_the_residual_and_restores_the_codes():
    """QPiSSA: a residual without its largest singular values loses less to four bits than the weight does."""
    torch.manual_seed(0)
    weight = torch.randn(64, 4) @ torch.randn(4, 64) + 0.3 * torch.randn(64, 64)
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    plain[0].weight = nn.Parameter(weight)
    rounded = compress.apply(copy.deepcopy(plain), compress.NF4(block=16), "*")
    error = (weight_of(rounded[0]) - weight).norm()
    first = compress.apply(adapt.apply(plain, adapt.PiSSA(rank=4), "*"), compress.NF4(block=16), "0.base")
    assert (weight_of(first[0]) - weight).norm() < 0.5 * error  # the residual's norm is under a third of the weight's
    codes = {key: value.clone() for key, value in rounded[0].stored.items()}
    adapt.apply(rounded, adapt.PiSSA(rank=4), "*")
    assert any(not torch.equal(rounded[0].base.stored[key], value) for key, value in codes.items())
    adapt.remove(rounded)
    assert all(torch.equal(rounded[0].stored[key], value) for key, value in codes.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [None, compress.NF4(block=4)])
def test_files_of_our_own_give_the_same_adapter(method, form, tmp_path):
    model, x = network(torch.float32), torch.randn(3, 12)
    fresh = network(torch.float32)
    for each in (model, fresh):
        if form is not None:
            compress.apply(each, form, "*")
    shaken(adapt.apply(model, METHODS[method], ["0", "2"]))
    adapt.save(model, tmp_path / "a.safetensors")
    adapt.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))


def test_files_of_version_2_are_read(tmp_path):
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, x = put("LoRA"), torch.randn(3, 12, dtype=torch.float64)
    path = tmp_path / "a.safetensors"
    adapt.save(model, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["paperworks.adapter"])
    del header["whole"]
    save_file(load_file(path), path, metadata={"paperworks.adapter": json.dumps(header | {"version": 2})})
    assert torch.equal(adapt.load(network(), path)(x), model(x))


def test_pissa_that_cannot_be_stored_leaves_the_model_as_it_was(monkeypatch):
    model = compress.apply(network(torch.float32), compress.NF4(block=4), "*")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def second_fails(self, weight, stored):
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("no room")
        return self.encode(weight)

    monkeypatch.setattr(compress.NF4, "reencode", second_fails)
    with pytest.raises(ValueError, match="no room"):
        adapt.apply(model, adapt.PiSSA(rank=2), "*")
    assert not adapt.adapted(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


CONFIGS = {
    "DoRA": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "PiSSA": ("lora_A", "lora_B"),
    "IA3": ("ia3_l",),
}
NAMES = {
    "llama2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}


def theirs(method, family):
    from peft import IA3Config, LoraConfig, get_peft_model

    names, feedforward = NAMES[family]
    fan = family == "gpt2"
    if method == "IA3":
        config = IA3Config(target_modules=names, feedforward_modules=feedforward, fan_in_fan_out=fan)
    else:
        options = {"use_dora": True} if method == "DoRA" else {"init_lora_weights": "pissa"}
        config = LoraConfig(r=4, lora_alpha=12, target_modules=names, fan_in_fan_out=fan, lora_dropout=0.0, **options)
    return shaken(get_peft_model(oracle(family), config)).eval()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama2", "gpt2"])
@pytest.mark.parametrize("method", CONFIGS)
def test_outputs_gradients_files_and_merge_equal_pefts(method, family, tmp_path):
    from peft import PeftModel

    peft = theirs(method, family)
    peft.save_pretrained(tmp_path / "theirs")
    ours = adapt.load_peft(oracle(family), tmp_path / "theirs").eval()
    kinds = {type(layer.adapter).__name__ for layer in adapt.adapted(ours).values()}
    assert kinds == {method}
    one, other = ours(TOKENS).logits, peft(TOKENS).logits
    assert (other - oracle(family)(TOKENS).logits).abs().max() > 1e-2 * other.abs().max()
    assert (one - other).abs().max() <= 2e-5 * other.abs().max()  # float32; PiSSA's residual comes from another SVD
    for logits in (one, other):
        logits.square().mean().backward()
    for path, layer in adapt.adapted(ours).items():
        twin = peft.base_model.model.get_submodule(path)
        for key, mine in layer.delta.to_peft().items():
            held = getattr(twin, key.removesuffix(".weight"))["default"]
            wanted = (held if isinstance(held, nn.Parameter) else held.weight).grad
            named = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
            found = getattr(layer.delta, named.get(key, "scale")).grad
            assert mine.numel() == wanted.numel()
            assert (found.flatten() - wanted.flatten()).abs().max() <= 1e-4 * wanted.abs().max()
    adapt.save_peft(ours, tmp_path / "ours", base_model="base")
    again = PeftModel.from_pretrained(oracle(family), tmp_path / "ours").eval()
    assert (again(TOKENS).logits - other).abs().max() <= 2e-5 * other.abs().max()
    merged, wanted = adapt.merge(ours), peft.merge_and_unload()
    for (name, mine), (_, weight) in zip(merged.named_parameters(), wanted.named_parameters(), strict=True):
        assert (mine - weight).abs().max() <= 2e-5 * weight.abs().max(), name


@pytest.mark.parity
def test_dora_with_dropout_equals_pefts():
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        network(torch.float32), LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    )
    ours = adapt.apply(network(torch.float32), adapt.DoRA(rank=2, alpha=8, dropout=0.5), "0")
    shaken(ours)
    twin = peft.base_model.model[0]
    twin.lora_A["default"].weight.data.copy_(ours[0].delta.down.data)
    twin.lora_B["default"].weight.data.copy_(ours[0].delta.up.data)
    twin.lora_magnitude_vector["default"].weight.data.copy_(ours[0].delta.magnitude.data)
    x = torch.randn(5, 12)
    outs = []
    for model in (ours.train(), peft.train()):
        torch.manual_seed(3)
        outs.append(model(x))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


@pytest.mark.parity
def test_ia3_and_dora_files_split_over_a_fused_layer(tmp_path):
    from paperworks.checkpoints import from_transformers, huggingface_names

    for method in ("DoRA", "IA3"):
        peft = theirs(method, "gpt2")
        peft.save_pretrained(tmp_path / method)
        ours = from_transformers(oracle("gpt2")).eval()
        adapt.load_peft(ours, tmp_path / method, rename=huggingface_names(ours))
        wanted = peft(TOKENS).logits
        assert (ours(TOKENS) - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    theirs("PiSSA", "gpt2").save_pretrained(tmp_path / "PiSSA")
    with pytest.raises(ValueError, match="PiSSA of a fused layer cannot be split"):
        adapt.load_peft(from_transformers(oracle("gpt2")), tmp_path / "PiSSA", rename=huggingface_names(ours))


def test_pissa_over_a_format_is_not_written_for_peft(tmp_path):
    model = adapt.apply(compress.apply(network(), compress.NF4(block=4), "*"), adapt.PiSSA(rank=2), "*")
    with pytest.raises(ValueError, match=r"0: peft starts PiSSA from a plain weight.*decompress"):
        adapt.save_peft(model, tmp_path / "a")
