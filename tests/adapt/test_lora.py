import pytest
import torch
from torch import nn

from paperworks import adapt, compress
from paperworks.core.linear import weight_of
from paperworks.models import preset
from tests.parity.families import oracle


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def randomize(model):
    for module in adapt.adapted(model).values():
        nn.init.normal_(module.delta.up)
        nn.init.normal_(module.delta.down)


def test_an_adapter_changes_nothing_at_first_and_trains_alone():
    model, x = network(), torch.randn(3, 12)
    before = model(x)
    adapt.apply(model, adapt.LoRA(rank=2), targets=["0", "2"])
    assert torch.equal(model(x), before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"{layer}.deltas.default.{part}" for layer in (0, 2) for part in ("down", "up")]
    assert adapt.trainable_parameters(model) == 2 * (12 + 16) + 2 * (16 + 8)  # sum of r (d + k)
    model(x).sum().backward()
    assert model[0].base.weight.grad is None
    assert (model[2].delta.up.grad != 0).any()


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        (adapt.LoRA(rank=4, alpha=16), 4.0),
        (adapt.LoRA(rank=4), 1.0),
        (adapt.LoRA(rank=4, alpha=16, rank_stabilized=True), 8.0),
    ],
)
def test_the_update_is_its_equation(adapter, scale):
    model = network().double()
    base = model[0].weight.clone()
    adapt.apply(model, adapter, targets="0")
    model.double()
    randomize(model)
    delta = model[0].delta
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = x @ (base + scale * delta.up @ delta.down).T + model[0].base.bias
    assert (model[0](x) - expected).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(delta.weight()) == 4


def test_disabled_gives_the_base_bit_for_bit():
    model, x = network(), torch.randn(3, 12)
    before = model(x)
    adapt.apply(model, adapt.LoRA(rank=2), targets="*")
    randomize(model)
    assert not torch.equal(model(x), before)
    with adapt.disabled(model):
        assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="stop"), adapt.disabled(model):
        raise RuntimeError("stop")
    assert not torch.equal(model(x), before)  # enabled again after the exception


@pytest.mark.parametrize("kind", ["plain", "transposed", "NF4"])
def test_merging_keeps_the_function_up_to_the_formats_rounding(kind):
    model = oracle("gpt2") if kind == "transposed" else network()
    targets = "attention" if kind == "transposed" else "*"
    tolerance = 1e-5  # float32, the bar of the catalogue
    if kind == "NF4":
        compress.apply(model, compress.NF4(block=8), targets="*")
        tolerance = 0.6  # the merged weight is rounded to 4 bits again; outputs are of order 10
    adapt.apply(model, adapt.LoRA(rank=2), targets=targets)
    randomize(model)
    x = torch.randint(1, 97, (2, 5)) if kind == "transposed" else torch.randn(3, 12)

    def run():
        out = model(x)
        return out if torch.is_tensor(out) else out.logits

    layers = {path: weight_of(module).clone() for path, module in adapt.adapted(model).items()}
    before = run().detach()
    adapt.merge(model)
    assert not adapt.adapted(model)
    for path, weight in layers.items():
        merged = weight_of(model.get_submodule(path))
        assert (merged - weight).abs().max() <= (0.2 * weight.abs().max() if kind == "NF4" else 1e-6)
    assert (run() - before).abs().max() / before.abs().max() <= tolerance


def test_merged_nf4_keeps_its_format():
    model = compress.apply(network(), compress.NF4(block=8), targets="*")
    adapt.apply(model, adapt.LoRA(rank=2), targets="*")
    adapt.merge(model)
    assert isinstance(model[0], compress.CompressedLinear)


def test_remove_gives_the_base_back():
    model, x = network(), torch.randn(3, 12)
    before = model(x)
    adapt.remove(adapt.apply(model, adapt.LoRA(rank=2), targets="*"))
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear


def test_adapters_round_trip_through_a_file_bit_for_bit(tmp_path):
    model, x = network(), torch.randn(3, 12)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    adapt.apply(model, adapt.LoRA(rank=2, alpha=7, dropout=0.1), targets="*").eval()
    randomize(model)
    adapt.save(model, tmp_path / "a.safetensors")
    adapt.load(fresh, tmp_path / "a.safetensors").eval()
    assert torch.equal(fresh(x), model(x))
    assert adapt.adapted(fresh)["0"].adapter == adapt.LoRA(rank=2, alpha=7, dropout=0.1)
    assert (tmp_path / "a.safetensors").stat().st_size < 2000  # nothing of the base is in it


def test_dropout_acts_on_the_deltas_input_in_training_only():
    model = adapt.apply(network(), adapt.LoRA(rank=2, dropout=0.5), targets="0")
    randomize(model)
    x = torch.randn(3, 12)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with adapt.disabled(model):
        assert torch.equal(model(x), model(x))  # the base's input is not dropped


def test_adapters_work_on_other_libraries_models_and_decode():
    model = oracle("llama2")
    tokens = torch.randint(1, 97, (1, 5))
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    before = model(tokens).logits
    randomize(model)
    assert not torch.equal(model(tokens).logits, before)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_published_parameter_counts():
    """GPT-3 175B (96 layers of 12,288), rank 4 on query and value: 18,874,368 (the paper prints 18M)."""
    with torch.device("meta"):
        layer = nn.Linear(12_288, 12_288)
        delta = adapt.LoRA(rank=4).build(adapt.LayerInfo.of(layer))
        smollm = preset("smollm2-135m").build()
        adapt.apply(smollm, adapt.LoRA(rank=8), targets="blocks.*.mixer.{query,value}")
    assert 96 * 2 * sum(parameter.numel() for parameter in delta.parameters()) == 18_874_368
    assert adapt.trainable_parameters(smollm) == 460_800  # the catalogue's count


def test_wrong_use_is_refused_and_changes_nothing(tmp_path):
    model = network()
    with pytest.raises(ValueError, match=r"2: PiSSA\.rank 9 exceeds the 8 singular values"):
        adapt.apply(model, adapt.PiSSA(rank=9), targets="2")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no adapters"):
        adapt.merge(model)
    adapt.apply(model, adapt.LoRA(rank=2), targets="0")
    with pytest.raises(ValueError, match="has an adapter already"):
        adapt.apply(model, adapt.LoRA(rank=2), targets="*")
    adapt.save(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(10, 16))
    with pytest.raises(
        ValueError, match=r"made for another model:\n  0.down: of shape \(2, 12\), the model needs \(2, 10\)"
    ):
        adapt.load(other, tmp_path / "a.safetensors")
    assert type(other[0]) is nn.Linear
    with pytest.raises(FileNotFoundError):
        adapt.load(other, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        adapt.load(other, tmp_path / "cut.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize("stabilized", [False, True])
def test_forward_gradients_and_merge_equal_peft(stabilized):
    from peft import LoraConfig, get_peft_model

    ours, theirs = oracle("llama2", torch.float64), oracle("llama2", torch.float64)
    names = ["q_proj", "v_proj"]
    theirs = get_peft_model(
        theirs, LoraConfig(r=4, lora_alpha=12, target_modules=names, use_rslora=stabilized, lora_dropout=0.0)
    )
    adapt.apply(ours, adapt.LoRA(rank=4, alpha=12, rank_stabilized=stabilized), targets=[f"*.{name}" for name in names])
    ours.double()
    theirs.double()
    randomize(ours)
    for path, module in adapt.adapted(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        twin.lora_A["default"].weight.data.copy_(module.delta.down.data)
        twin.lora_B["default"].weight.data.copy_(module.delta.up.data)
    tokens = torch.randint(1, 97, (2, 7))
    one, other = ours(tokens).logits, theirs(tokens).logits
    assert (one - other).abs().max() < 1e-5 * other.abs().max()
    for logits in (one, other):
        logits.square().sum().backward()
    for path, module in adapt.adapted(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        grads = ((module.delta.down, twin.lora_A["default"].weight), (module.delta.up, twin.lora_B["default"].weight))
        for mine, grad in ((one.grad, other.grad) for one, other in grads):
            assert (mine - grad).abs().max() <= 1e-5 * grad.abs().max()
    merged = theirs.merge_and_unload()
    adapt.merge(ours)
    for (_, mine), (_, weight) in zip(ours.named_parameters(), merged.named_parameters(), strict=True):
        assert (mine - weight).abs().max() <= 1e-5
