import copy
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paperworks import adapt, compress
from paperworks.core.errors import CorruptFile
from paperworks.core.linear import weight_of


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def randomize(model, std=1.0):
    for module in adapt.adapted(model).values():
        for parameter in module.deltas.parameters():
            nn.init.normal_(parameter, std=std)


def two(targets=("*", "0")):
    model = network()
    adapt.apply(model, adapt.LoRA(rank=2), targets=targets[0], name="a")
    adapt.apply(model, adapt.LoRA(rank=3), targets=targets[1], name="b")
    randomize(model)
    return model


def trained(model):
    return {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_adapter_put_on_last_is_in_use_alone_and_trained_alone():
    model = two()
    assert adapt.names(model) == ["a", "b"]
    assert adapt.in_use(model) == {"b": 1.0}
    assert trained(model) == {"b"}
    adapt.use(model, {"a": 0.7, "b": 0.3})
    assert trained(model) == {"a", "b"}
    adapt.use(model, None)
    assert adapt.trainable_parameters(model) == 0


def test_using_one_is_as_if_the_other_were_not_there():
    model, x = two(), torch.randn(3, 12)
    for kept, other in (("a", "b"), ("b", "a")):
        alone = adapt.remove(copy.deepcopy(model), other)
        adapt.use(alone, kept)
        assert torch.equal(adapt.use(model, kept)(x), alone(x))


def test_weighted_sums_are_their_equation():
    model, x = two(), torch.randn(3, 12, dtype=torch.float64)
    model.double()
    adapt.use(model, {"a": 0.7, "b": -0.3})
    first, last = model[0], model[2]
    by_hand = first.base.weight + 0.7 * first.deltas["a"].weight() - 0.3 * first.deltas["b"].weight()
    assert (first(x) - (x @ by_hand.T + first.base.bias)).abs().max() < 1e-12
    assert (weight_of(first) - by_hand).abs().max() < 1e-14
    assert (weight_of(last) - last.base.weight - 0.7 * last.deltas["a"].weight()).abs().max() < 1e-14


def test_none_and_disabled_are_the_base_bit_for_bit():
    model, x = two(), torch.randn(3, 12)
    base = adapt.remove(copy.deepcopy(model))
    assert type(base[0]) is nn.Linear
    with adapt.disabled(model):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))
    assert torch.equal(adapt.use(model, None)(x), base(x))


def test_switching_copies_nothing_and_takes_milliseconds():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    for name in ("a", "b"):
        adapt.apply(model, adapt.LoRA(rank=2), "*", name=name)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    took = []
    for name in ("a", "b", "a", "b", "a"):
        start = time.perf_counter()
        adapt.use(model, name)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5  # a few milliseconds; the rest is room for a busy machine
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_merge_takes_what_is_in_use_with_its_weights_and_leaves_the_rest():
    model, x = two(), torch.randn(3, 12)
    adapt.use(model, {"a": 0.5})
    before = model(x)
    other = model[0].deltas["b"].weight()
    adapt.merge(model)
    assert adapt.names(model) == ["b"]
    assert type(model[2]) is nn.Linear
    assert adapt.in_use(model) == {}
    # float32, sums of a dozen terms of order 10 in another order
    assert (model(x) - before).abs().max() < 1e-4
    base = model[0].base.weight.clone()
    adapt.merge(adapt.use(model, "b"))
    assert (model[0].weight - base - other).abs().max() < 1e-5
    assert not adapt.adapted(model)


def test_nothing_in_use_cannot_be_merged():
    with pytest.raises(ValueError, match="no adapter is in use"):
        adapt.merge(adapt.use(two(), None))


def test_a_merge_that_would_round_the_adapter_away_is_refused_and_changes_nothing():
    model = compress.apply(network(), compress.NF4(block=8), targets="2")
    adapt.apply(model, adapt.LoRA(rank=2), "*")
    randomize(model, std=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = adapt.merge_error(model)
    assert errors["0"] < 1e-1 < 1 < errors["2"]
    with pytest.raises(
        ValueError, match=r"on 1 of 2 layers.*\n  2: rounding error .*, adapter .*\n.*decompress.*lossy"
    ):
        adapt.merge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    wanted = weight_of(model[2])
    change = model[2].delta.weight().norm()
    adapt.merge(model, lossy=True)
    assert ((weight_of(model[2]) - wanted).norm() / change).item() == pytest.approx(errors["2"], rel=1e-5)


def test_merging_an_adapter_that_adds_nothing_does_not_round_the_base_again():
    model = compress.apply(network(), compress.NF4(block=8, double_quantization=True), targets="*")
    before = weight_of(model[0])
    adapt.merge(adapt.apply(model, adapt.LoRA(rank=2), "*"))
    assert torch.equal(weight_of(model[0]), before)


def test_merging_encodes_a_layer_once(monkeypatch):
    model = compress.apply(network(), compress.NF4(block=8), targets="2")
    randomize(adapt.apply(model, adapt.LoRA(rank=2), "*"), std=1.0)
    calls = []
    encode = compress.NF4.reencode
    monkeypatch.setattr(compress.NF4, "reencode", lambda *rest: calls.append(0) or encode(*rest))
    expected = model[2].base.format.decode(
        encode(model[2].base.format, weight_of(model[2]), model[2].base.stored), (model[2].base.shape)
    )
    adapt.merge(model, lossy=True)
    assert calls == [0]
    assert torch.equal(weight_of(model[2]), expected)


def test_a_tied_weight_is_not_merged_into():
    model = network()
    model.append(nn.Linear(12, 16))
    model[3].weight = model[0].weight
    adapt.apply(model, adapt.LoRA(rank=2), "0")
    with pytest.raises(ValueError, match=r"0 shares its weight with 3\.weight"):
        adapt.merge(model)


def test_adapters_in_another_dtype_give_outputs_of_the_bases():
    model = adapt.apply(network(), adapt.LoRA(rank=2), "*", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    assert model(torch.randn(3, 12)).dtype == torch.float32


def test_named_adapters_are_saved_one_by_one_and_loaded_beside_others(tmp_path):
    model, x = two(), torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"several adapters \(a, b\); say which"):
        adapt.save(model, tmp_path / "x.safetensors")
    for name in ("a", "b"):
        adapt.save(model, tmp_path / f"{name}.safetensors", name)
    fresh = adapt.remove(copy.deepcopy(model))
    adapt.load(fresh, tmp_path / "a.safetensors", "first")
    adapt.load(fresh, tmp_path / "b.safetensors", "second")
    assert adapt.names(fresh) == ["first", "second"]
    adapt.use(fresh, {"first": 0.4, "second": 2.0})
    adapt.use(model, {"a": 0.4, "b": 2.0})
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match=r"0 has an adapter already named 'first' \(LoRA"):
        adapt.load(fresh, tmp_path / "b.safetensors", "first")


def test_what_layers_share_is_stored_once_and_shared_again(tmp_path):
    model, x = network(), torch.randn(3, 12)
    base = copy.deepcopy(model)
    adapt.apply(model, adapt.SAID(dimension=20), "*")
    randomize(model)
    adapt.save(model, tmp_path / "a.safetensors")
    assert sum(len(key.split(".theta")) > 1 for key in load_file(tmp_path / "a.safetensors")) == 1
    adapt.load(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), model(x))
    assert base[0].delta.theta is base[2].delta.theta
    assert adapt.trainable_parameters(base) == 20


def test_two_groups_under_one_name_stay_two(tmp_path):
    model, x = network(), torch.randn(3, 12)
    base, same = copy.deepcopy(model), adapt.DID(dimension=5)
    adapt.apply(adapt.apply(model, same, "0"), same, "2")
    randomize(model)
    adapt.save(model, tmp_path / "a.safetensors")
    assert torch.equal(adapt.load(base, tmp_path / "a.safetensors")(x), model(x))
    assert adapt.trainable_parameters(base) == 10


def _rewritten(path, change):
    """Write the file again with a changed description."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["paperworks.adapter"])
    change(header)
    save_file(load_file(path), path, metadata={"paperworks.adapter": json.dumps(header)})


def _huge(header):
    header["groups"][0]["adapter"] = {"type": "DID", "dimension": 10**13}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda h: h.update(version=99), CorruptFile, "version 99; this release reads 2"),
        (lambda h: h.update(groups=[]), CorruptFile, "needs a list of groups"),
        (lambda h: h["groups"].append({"layers": ["0"]}), CorruptFile, r"0 is named twice\n.*does not describe"),
        (
            lambda h: h.update(shared={"0.up": "nowhere"}),
            CorruptFile,
            r"'nowhere', which is not in the file\n.*at once",
        ),
        (lambda h: h["groups"][0].update(adapter={"type": "NF4"}), ValueError, "description of a Adapter, got NF4"),
        (lambda h: h["groups"][0]["layers"].append("9"), ValueError, "9: the model has no such linear layer"),
        (lambda h: h["groups"][0]["layers"].pop(), ValueError, r"2\.\w+: belongs to no layer\n  2\.\w+: belongs"),
        (_huge, ValueError, r"0\.theta: missing, the model needs \(10000000000000,\)"),
    ],
)
def test_damaged_and_hostile_files_are_refused_with_everything_that_is_wrong(tmp_path, change, error, match):
    path = tmp_path / "a.safetensors"
    adapt.save(adapt.apply(network(), adapt.LoRA(rank=2), "*"), path)
    _rewritten(path, change)
    model = network()
    with pytest.raises(error, match=match):
        adapt.load(model, path)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_truncated_files_are_refused_at_every_length(tmp_path):
    path = tmp_path / "a.safetensors"
    adapt.save(adapt.apply(network(), adapt.LoRA(rank=2), "*"), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match="cannot be read as an adapter"):
            adapt.load(network(), path)


def test_wrong_names_are_refused():
    model = two()
    with pytest.raises(ValueError, match=r"unknown adapter 'c'.*Known: a, b"):
        adapt.use(model, "c")
    with pytest.raises(ValueError, match="unknown adapter 'c'"):
        adapt.remove(model, "c")
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        adapt.use(model, {"a": float("nan")})
    with pytest.raises(ValueError, match="text without dots"):
        adapt.apply(model, adapt.LoRA(rank=2), "*", name="a.b")
    with pytest.raises(ValueError, match="cannot be named 'train'"):
        adapt.apply(model, adapt.LoRA(rank=2), "*", name="train")
    with pytest.raises(ValueError, match=r"several adapters \(a, b\)"):
        _ = adapt.use(model, None)[0].delta
    assert adapt.names(model) == ["a", "b"]
