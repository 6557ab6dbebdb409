"""Every family: its config entries, its tensors, and which family writes a model."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import paperworks as pw
from paperworks.checkpoints import families, huggingface_names, load_folder, save_folder
from paperworks.checkpoints.family import FIXED, INERT
from paperworks.checkpoints.spec_difference import differences
from paperworks.core.errors import CorruptFile
from paperworks.models import Parallel
from paperworks.nn import LayerNorm
from tests.checkpoints.families.small import SMALL, spec

every_family = pytest.mark.parametrize("name", families.names())


def class_config(name: str) -> dict[str, Any]:
    return transformers.AutoConfig.for_model(name).to_dict()


def rewritten(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def saved(name, tmp_path):
    torch.manual_seed(0)
    model = spec(name).build()
    model.source_family = name
    save_folder(model, tmp_path / "m")
    return tmp_path / "m"


def test_all_sixteen_families_have_a_small_model_here():
    assert sorted(families.names()) == sorted(SMALL)
    assert len(families.names()) == 16


def test_lookup_names_near_misses():
    with pytest.raises(ValueError, match="unknown model_type 'mistrel'; did you mean 'mistral'"):
        families.lookup("mistrel")


# --- config entries ---------------------------------------------------------------------------------------------------


@every_family
def test_every_entry_of_the_class_in_transformers_is_honoured_fixed_or_inert(name):
    family = families.lookup(name)
    known = set(family.defaults) | set(family.fixed) | set(FIXED) | family.inert | INERT | set(family.synonyms)
    assert {key for key in class_config(name) if not key.startswith("_")} - known == set()


@every_family
def test_an_absent_entry_takes_the_default_of_the_class_in_transformers(name):
    family = families.lookup(name)
    whole = class_config(name)
    assert differences(family.read({}), family.read(whole)) == []
    for key in family.defaults:
        rest = {other: value for other, value in whole.items() if other != key}
        assert differences(family.read(rest), family.read(whole)) == [], key


@every_family
def test_lists_of_entries_do_not_overlap(name):
    family = families.lookup(name)
    assert not set(family.defaults) & (set(family.fixed) | family.inert | INERT | set(FIXED))
    assert not set(family.fixed) & (family.inert | INERT)


@every_family
def test_every_honoured_entry_changes_the_spec_or_is_refused(name):
    family = families.lookup(name)
    before = family.read(SMALL[name])
    values = (True, False, 1, 2, 3, 48, 0.125, 0.5, "relu", "gated-gelu", ["full_attention"], {"rope_type": "yam"})
    # a window and a trained length say nothing alone
    beside = {
        "sliding_window": {"use_sliding_window": True, "max_window_layers": 0} if name == "qwen2" else {},
        "use_sliding_window": {"max_window_layers": 0},
        "max_window_layers": {"use_sliding_window": True},
        "original_max_position_embeddings": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
        if name != "phi3"
        else {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "rotary_emb_base": {"rope_theta": None},
        "layer_types": {"use_sliding_window": True} if name == "qwen2" else {},
    }
    for key in family.defaults:
        context = SMALL[name] | beside.get(key, {})
        before = family.read(context)
        noticed = 0
        for value in values:
            try:
                noticed += family.read(context | {key: value}) != before
            except ValueError:
                noticed += 1
        assert noticed, f"{key} has no effect"


@every_family
def test_other_values_of_fixed_entries_are_refused_by_name(name):
    family = families.lookup(name)
    for key in {**FIXED, **family.fixed}:
        with pytest.raises(ValueError, match=f"{name} with {key}='something else' is not read"):
            family.read(SMALL[name] | {key: "something else"})


@every_family
def test_an_entry_that_no_list_holds_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"does not know: mystery_factor=2.0"):
        families.lookup(name).read(SMALL[name] | {"mystery_factor": 2.0})


@every_family
def test_inert_entries_are_passed_over(name):
    family = families.lookup(name)
    extra = dict.fromkeys(family.inert | INERT, "whatever") | {"_attn_implementation_autoset": True}
    assert family.read(SMALL[name] | extra) == family.read(SMALL[name])


def test_quantized_folders_are_refused_by_the_entry_that_says_so():
    with pytest.raises(ValueError, match=r"quantization_config=.*gptq"):
        spec("llama", quantization_config={"quant_method": "gptq", "bits": 4})


def test_two_names_of_one_entry_must_agree():
    assert spec("gpt2", hidden_size=16).dim == 16
    with pytest.raises(ValueError, match="n_embd=16 and, by another name, 24"):
        spec("gpt2", hidden_size=24)


def test_a_depth_that_no_model_has_is_refused_before_a_list_is_made_of_it():
    for name in ("rwkv", "gemma2", "qwen2"):
        with pytest.raises(ValueError, match="num_hidden_layers=2147483648, more than 65536 layers"):
            spec(name, num_hidden_layers=2**31)


# --- tensors ----------------------------------------------------------------------------------------------------------


@every_family
def test_a_tensor_of_no_name_in_the_family_is_refused_by_name(name, saved):
    rewritten(saved, lambda tensors: tensors.update({"cls_of_another.score.weight": torch.zeros(2, 2)}))
    with pytest.raises(CorruptFile, match=r"unexpected cls_of_another\.score\.weight"):
        load_folder(saved)


@every_family
def test_tensors_that_only_other_families_pass_over_are_refused(name, saved):
    family = families.lookup(name)
    foreign = {each for other in families.FAMILIES.values() for each in other.ignorable}
    examples = {each.replace("*", "0") for each in foreign if not family.ignores(each.replace("*", "0"))}
    rewritten(saved, lambda tensors: tensors.update({each: torch.zeros(2, 2) for each in examples}))
    with pytest.raises(CorruptFile) as error:
        load_folder(saved)
    assert {each for each in examples if f"unexpected {each}" in str(error.value)} == examples


@every_family
def test_every_ignorable_tensor_is_passed_over_with_and_without_the_prefix(name, saved):
    family = families.lookup(name)
    plain = load_folder(saved).state_dict()
    examples = [each.replace("*", "0") for each in family.ignorable]
    examples += [each.removeprefix(family.prefix) for each in examples]
    rewritten(saved, lambda tensors: tensors.update({each: torch.zeros(2, 2) for each in examples}))
    found = load_folder(saved).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@every_family
def test_every_missing_tensor_is_named(name, saved):
    names = list(load_file(saved / "model.safetensors"))
    optional = {"lm_head.weight"} if name == "t5" else set()
    if name == "bert":
        optional = {"bert.pooler.dense.weight"}  # a file without it is of a model without a pooler: its bias is left
    for missing in [each for each in names if each not in optional][:: max(1, len(names) // 6)]:
        tensor = load_file(saved / "model.safetensors")[missing]
        rewritten(saved, lambda tensors, missing=missing: tensors.pop(missing))
        with pytest.raises(CorruptFile, match=f"missing {missing}".replace(".", r"\.")):
            load_folder(saved)
        rewritten(saved, lambda tensors, missing=missing, tensor=tensor: tensors.update({missing: tensor}))


@every_family
def test_files_without_the_prefix_of_the_whole_model_are_read(name, saved):
    prefix = families.lookup(name).prefix
    before = load_folder(saved).state_dict()

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix(prefix)] = tensors.pop(key)

    rewritten(saved, strip)
    after = load_folder(saved).state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_llama_file_with_a_head_of_bert_is_refused(tmp_path):
    save_folder(spec("llama").build(), tmp_path / "m")
    rewritten(tmp_path / "m", lambda tensors: tensors.update({"cls.score.weight": torch.zeros(2, 16)}))
    with pytest.raises(CorruptFile, match=r"unexpected cls\.score\.weight"):
        pw.load(tmp_path / "m")


def test_a_head_that_differs_from_the_table_it_is_said_to_repeat_is_kept(tmp_path):
    model = spec("llama", tie_word_embeddings=True).build()
    save_folder(model, tmp_path / "m")
    assert load_folder(tmp_path / "m").spec.tied
    rewritten(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": torch.ones(31, 16)}))
    found = load_folder(tmp_path / "m")
    assert not found.spec.tied
    assert torch.equal(found.unembedding.weight, torch.ones(31, 16))


def test_copies_of_the_shared_table_of_t5_must_repeat_it(tmp_path):
    save_folder(spec("t5").build(), tmp_path / "m")
    copy = "decoder.embed_tokens.weight"
    rewritten(tmp_path / "m", lambda tensors: tensors.update({copy: tensors["shared.weight"].clone()}))
    load_folder(tmp_path / "m")
    rewritten(tmp_path / "m", lambda tensors: tensors.update({copy: tensors["shared.weight"] + 1}))
    with pytest.raises(CorruptFile, match=f"{copy} should repeat shared.weight"):
        load_folder(tmp_path / "m")
    rewritten(tmp_path / "m", lambda tensors: tensors.pop("shared.weight"))
    load_folder(tmp_path / "m")


def test_norms_of_old_bert_files_are_read(tmp_path):
    model = spec("bert").build()
    save_folder(model, tmp_path / "m")

    def old(tensors):
        for key in list(tensors):
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(key)

    rewritten(tmp_path / "m", old)
    found = load_folder(tmp_path / "m").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


# --- which family writes ----------------------------------------------------------------------------------------------


@every_family
def test_a_model_is_written_as_the_family_it_came_from(name, saved, tmp_path):
    model = load_folder(saved)
    assert model.source_family == name
    save_folder(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == name
    again = load_folder(tmp_path / "again")
    assert again.spec == model.spec
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@every_family
def test_what_a_family_writes_reads_back_as_the_same_model(name):
    family = families.lookup(name)
    assert differences(spec(name), family.read(family.write(spec(name)))) == []


def test_a_model_without_a_source_is_written_by_the_first_family_that_expresses_it():
    plain = spec("phi3")
    assert families.writer(plain)[0].model_type == "llama"
    assert families.writer(plain, "phi3")[0].model_type == "phi3"


def test_a_source_that_no_longer_expresses_the_model_is_left_for_one_that_does():
    assert families.writer(spec("mistral", sliding_window=9), "llama")[0].model_type == "mistral"


def test_part_rotated_heads_are_not_written_as_llama_whose_readers_rotate_the_whole_head():
    partial = spec("phi3", partial_rotary_factor=0.5)
    assert families.writer(partial)[0].model_type == "phi3"


def test_names_of_layers_follow_the_family_that_the_model_came_from():
    model = spec("phi3").build()
    assert "model.layers.0.self_attn.q_proj" in huggingface_names(model)
    model.source_family = "phi3"
    assert huggingface_names(model)["model.layers.0.mlp.gate_up_proj"] == [
        "blocks.0.feedforward.gate",
        "blocks.0.feedforward.up",
    ]


def test_a_refusal_lists_each_familys_reason_the_nearest_first():
    from paperworks.models.presets.t5 import switch

    with pytest.raises(ValueError, match="no Hugging Face family expresses this model") as error:
        families.writer(switch(16, 24, 2, 2, 8, experts=2, vocab_size=30))
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  switch_transformers: Experts.capacity is 1.25")
    assert len(lines) == 1 + len(families.names())


def test_a_refusal_says_which_field_would_be_lost():
    odd = spec("llama")
    with pytest.raises(ValueError, match=r"llama: the last norm is LayerNorm, this family has RMSNorm"):
        families.writer(replace(odd, norm=LayerNorm()))
    block = replace(odd.blocks[0], arrangement=Parallel())
    with pytest.raises(ValueError, match=r"llama: block.arrangement: Parallel would be read back as PreNorm"):
        families.writer(replace(odd, block=block))
