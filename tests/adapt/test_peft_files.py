import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paperworks import adapt
from paperworks.core.errors import CorruptFile

TOKENS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def randomize(parameters):
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)


def saved(folder, **options):
    model = adapt.apply(network(), adapt.LoRA(rank=2, **options), "*")
    randomize(p for p in model.parameters() if p.requires_grad)
    adapt.save_peft(model, folder, base_model="some/base")
    return model


def changed(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_goes_there_and_back_bit_for_bit(tmp_path):
    model = adapt.apply(network(), adapt.LoRA(rank=2, alpha=7, dropout=0.1, rank_stabilized=True), "0")
    adapt.apply(model, adapt.LoRA(rank=3, alpha=5.5, dropout=0.1, rank_stabilized=True), "2")
    randomize(p for p in model.parameters() if p.requires_grad)
    adapt.save_peft(model, tmp_path / "peft")
    fresh = network()
    fresh.load_state_dict(adapt.remove(adapt.load_peft(network(), tmp_path / "peft")).state_dict())
    adapt.load_peft(fresh, tmp_path / "peft", name="theirs")
    for path, layer in adapt.adapted(fresh).items():
        other = adapt.adapted(model)[path]
        assert layer.adapter == other.adapter
        assert torch.equal(layer.delta.up, other.delta.up)
        assert torch.equal(layer.delta.down, other.delta.down)


def test_paths_are_renamed_both_ways_and_fused_layers_split(tmp_path):
    model = saved(tmp_path / "plain")
    names = {"0": "model.first", "2": "model.last"}
    adapt.save_peft(model, tmp_path / "renamed", rename=names)
    back = adapt.load_peft(network(), tmp_path / "renamed", rename={v: k for k, v in names.items()}.__getitem__)
    assert torch.equal(back[2].delta.up, model[2].delta.up)
    split = nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(12, 6), "c": nn.Linear(16, 8)})
    adapt.load_peft(split, tmp_path / "plain", rename={"0": ["a", "b"], "2": "c"})
    joined = torch.cat((split["a"].delta.weight(), split["b"].delta.weight()))
    assert torch.equal(joined, model[0].delta.weight())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "the layer needs lora_A.weight .*, lora_magnitude_vector"),
        ({"bias": "all"}, "bias is 'all'; only 'none' can be read"),
        ({"modules_to_save": ["score"]}, r"modules_to_save is \['score'\], and the file holds none of them"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base as well"),
        ({"r": 4}, r"0: the configuration says rank 4, the matrices have 2\n  2: the"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, fields, match):
    saved(tmp_path)
    changed(tmp_path, **fields)
    model = network()
    with pytest.raises(ValueError, match=match):
        adapt.load_peft(model, tmp_path)
    assert type(model[0]) is nn.Linear


def test_damaged_folders_are_refused(tmp_path):
    saved(tmp_path)
    tensors = tmp_path / "adapter_model.safetensors"
    held = load_file(tensors)
    save_file({k: v for k, v in held.items() if "0.lora_A" not in k} | {"x": torch.zeros(2)}, tensors)
    with pytest.raises(
        ValueError, match=r"x, torch.float32 of shape \(2,\), is no LoRA matrix.*\n  0: lora_A is missing"
    ):
        adapt.load_peft(network(), tmp_path)
    save_file(held, tensors)
    with pytest.raises(ValueError, match=r"no linear layer 0; pass rename= .*\n  2: the model has no"):
        adapt.load_peft(nn.ModuleDict({"a": nn.Linear(12, 16)}), tmp_path)
    with pytest.raises(ValueError, match=r"2: lora_B has 8 rows, the layer 2 has 9 outputs"):
        adapt.load_peft(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9)), tmp_path)
    changed(tmp_path, r="8")
    with pytest.raises(CorruptFile, match="r is '8', which peft never writes"):
        adapt.load_peft(network(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptFile, match="is not valid JSON"):
        adapt.load_peft(network(), tmp_path)


def test_pickles_are_never_opened(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle.*safe_serialization"):
        adapt.load_peft(network(), tmp_path)


def test_what_peft_cannot_say_is_not_written(tmp_path):
    model = adapt.apply(network(), adapt.LoRA(rank=2, dropout=0.1), "0")
    adapt.apply(model, adapt.LoRA(rank=2), "2")
    with pytest.raises(ValueError, match="holds one dropout for all layers"):
        adapt.save_peft(model, tmp_path / "a")
    square = adapt.apply(network(), adapt.MoRA(rank=1), "*")
    with pytest.raises(ValueError, match="0 carries a MoRA; peft's layout has no place for a SquareDelta"):
        adapt.save_peft(square, tmp_path / "a")
    with pytest.raises(ValueError, match="rename gives 'same' for 2"):
        adapt.save_peft(saved(tmp_path / "b"), tmp_path / "a", rename=lambda path: "same")
    assert not (tmp_path / "a").exists()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_peft_reads_what_we_write_and_we_read_what_peft_writes(family, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.parity.families import oracle

    names = {"llama2": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    patterns = {"rank_pattern": {rf"{names[0]}": 2}, "alpha_pattern": {rf"1\..*{names[0]}": 5}}
    theirs = get_peft_model(
        oracle(family),
        LoraConfig(r=4, lora_alpha=12, target_modules=names, fan_in_fan_out=family == "gpt2", **patterns),
    ).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    wanted = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapt.load_peft(oracle(family), tmp_path / "theirs").eval()
    assert (ours(TOKENS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # float32, sums in another order
    assert {layer.delta.scale for layer in adapt.adapted(ours).values()} == {3.0, 6.0, 2.5}  # 12/4, 12/2, 5/2
    adapt.save_peft(ours, tmp_path / "ours", base_model="base")
    again = PeftModel.from_pretrained(oracle(family), tmp_path / "ours").eval()
    assert (again(TOKENS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama2", "gpt2", "phi3"])
def test_pefts_files_work_on_our_models_by_the_table_of_names(family, tmp_path):
    """Also shows that our query and key rows stand in Hugging Face's order: a permuted one would move the logits."""
    from peft import LoraConfig, get_peft_model

    from paperworks.checkpoints import from_transformers, huggingface_names
    from tests.parity.families import oracle

    names = {
        "llama2": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "gpt2": ["c_attn", "c_fc"],
        "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    }[family]
    theirs = get_peft_model(
        oracle(family), LoraConfig(r=4, target_modules=names, fan_in_fan_out=family == "gpt2")
    ).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = from_transformers(oracle(family)).eval()
    before = ours(TOKENS)
    adapt.load_peft(ours, tmp_path, rename=huggingface_names(ours, family if family == "phi3" else None))
    wanted = theirs(TOKENS).logits
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert (ours(TOKENS) - wanted).abs().max() <= 2e-5 * wanted.abs().max()  # float32, another model's order of sums


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("the base model")
    with pytest.raises(FileExistsError, match=r"holds model\.safetensors already"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
