"""What else adapters stand on: embeddings, tied unembeddings, stacked experts, patches, whole modules; and rows."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from paperworks import adapt, compress
from paperworks.adapt.stacked import AdaptedStack
from paperworks.checkpoints import from_transformers
from paperworks.core.coverage import CoverageWarning
from tests.parity.families import oracle

TOKENS = torch.randint(1, 97, (3, 7), generator=torch.Generator().manual_seed(0))


def shaken(model, seed=1):
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))
    return model


def logits(model, tokens=TOKENS):
    out = model(tokens)
    return out if torch.is_tensor(out) else out.logits


def close(one, other, tolerance=1e-5):
    """Float32, sums in another order."""
    return (one - other).abs().max() <= tolerance * other.abs().max()


# Embeddings and unembeddings


def test_an_embedding_is_adapted_where_it_is_named_and_equals_its_changed_table():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4)).double()
    adapt.apply(model, adapt.LoRA(rank=2), "*")
    assert list(adapt.adapted(model)) == ["1"]  # a pattern that matches linear layers means those
    model = adapt.remove(model)
    adapt.apply(model, adapt.LoRA(rank=2, alpha=6), "0")
    tokens = torch.randint(11, (3, 5))
    assert torch.equal(model[0](tokens), model[0].base(tokens))
    shaken(model)
    delta, table = model[0].delta, model[0].base.weight
    wanted = F.embedding(tokens, table + 3 * (delta.up @ delta.down).T)
    assert (model[0](tokens) - wanted).abs().max() < 1e-12
    assert (F.embedding(tokens, model[0].weight) - wanted).abs().max() < 1e-12
    assert model[0].num_embeddings == 11
    assert model[0].weight.shape == (11, 6)
    adapt.merge(model)
    assert (model[0](tokens) - wanted).abs().max() < 1e-12
    with pytest.raises(ValueError, match="MoRA cannot adapt an embedding"):
        adapt.apply(model, adapt.MoRA(rank=1), "0")


@pytest.mark.parity
def test_embedding_and_unembedding_adapters_and_whole_modules_equal_pefts(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["embed_tokens", "lm_head", "q_proj"], modules_to_save=["norm"]
    )
    peft = shaken(get_peft_model(oracle("llama2"), config)).eval()
    peft.save_pretrained(tmp_path / "theirs")
    ours = adapt.load_peft(oracle("llama2"), tmp_path / "theirs").eval()
    wanted = logits(peft)
    assert close(logits(ours), wanted)
    assert len(adapt.trained_whole(ours)) == 7  # peft compares the ends of names: "input_layernorm" is a "norm" too
    assert type(adapt.adapted(ours)["model.embed_tokens"].delta).__name__ == "EmbeddingDelta"
    adapt.save_peft(ours, tmp_path / "ours")
    assert close(logits(PeftModel.from_pretrained(oracle("llama2"), tmp_path / "ours").eval()), wanted)
    adapt.merge(ours)
    assert close(logits(ours), wanted)


@pytest.mark.parametrize("family", ["ours", "transformers"])
def test_a_tied_unembedding_is_adapted_alone_and_merged_only_when_untied(family):
    if family == "ours":
        model, path, embedding = from_transformers(oracle("smollm2")), "unembedding", "embedding"
    else:
        model, path, embedding = oracle("smollm2"), "lm_head", "model.embed_tokens"
    before = logits(model)
    table = model.get_submodule(embedding).weight.clone()
    shaken(adapt.apply(model, adapt.LoRA(rank=2), path))
    after = logits(model)
    assert not torch.allclose(after, before)
    with pytest.raises(ValueError, match=rf"{path} shares its weight with .*untie=\['{path}'\]"):
        adapt.merge(model)
    adapt.merge(model, untie=path)
    assert close(logits(model), after)
    assert torch.equal(model.get_submodule(embedding).weight, table)
    assert model.get_submodule(path).weight is not model.get_submodule(embedding).weight


# Modules trained whole


def test_whole_modules_are_trained_used_saved_and_merged_with_the_adapter(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    plain, x = copy.deepcopy(model), torch.randn(4, 6)
    adapt.apply(model, adapt.LoRA(rank=2), "0", modules_to_save=["1", "2"])
    assert torch.equal(model(x), plain(x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"1.copies.default.weight", "2.copies.default.weight", "0.deltas.default.up"} <= trained
    assert not any(".base." in name for name in trained)
    shaken(model)
    wanted = model(x)
    assert model[2].in_features == 6
    assert model[2].weight is model[2].copies["default"].weight
    with adapt.disabled(model):
        assert torch.equal(model(x), plain(x))
    adapt.save(model, tmp_path / "a.safetensors")
    assert torch.equal(adapt.load(copy.deepcopy(plain), tmp_path / "a.safetensors")(x), wanted)
    with pytest.raises(
        ValueError, match=r"2: trained whole, stored as .*weight \(3, 6\).*, the model needs weight \(4"
    ):
        adapt.load(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)), tmp_path / "a.safetensors")
    half = adapt.use(copy.deepcopy(model), {"default": 0.5})
    hidden = half[1](half[0](x))
    assert close(half[2](hidden), 0.5 * (plain[2](hidden) + model[2](hidden)))
    with pytest.raises(ValueError, match="merges only alone with weight 1"):
        adapt.merge(half)
    merged = adapt.merge(copy.deepcopy(model))
    assert close(merged(x), wanted)
    assert type(merged[2]) is nn.Linear
    assert torch.equal(adapt.remove(model)(x), plain(x))
    with pytest.raises(ValueError, match="2 is to be trained whole and adapted at once"):
        adapt.apply(copy.deepcopy(plain), adapt.LoRA(rank=2), "2", modules_to_save="2")


# Stacked experts


def mixture(family="mixtral"):
    return oracle(family)


STACKS = "*.experts.{gate_up_proj,down_proj}"


def test_stacked_experts_get_a_change_each_and_merge():
    model, before = mixture(), logits(mixture())
    adapt.apply(model, adapt.LoRA(rank=2, alpha=4), STACKS)
    assert torch.equal(logits(model), before)
    paths = [f"model.layers.{i}.mlp.experts.{name}" for i in range(3) for name in ("gate_up_proj", "down_proj")]
    assert list(adapt.adapted(model)) == paths
    shaken(model)
    after = logits(model)
    after.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    stack = model.model.layers[0].mlp.experts
    assert isinstance(stack, AdaptedStack)
    assert stack.num_experts == 4
    layer = adapt.adapted(model)[paths[0]]
    by_hand = stack.base.gate_up_proj + 2 * torch.einsum("eor,eri->eoi", layer.delta.up, layer.delta.down)
    assert close(layer.decoded_weight(), by_hand, 1e-6)
    with adapt.disabled(model):
        assert torch.equal(logits(model), before)
    merged = adapt.merge(copy.deepcopy(model))
    assert not any(isinstance(m, AdaptedStack) for m in merged.modules())
    assert close(logits(merged), after)
    assert torch.equal(logits(adapt.remove(model)), before)


def test_stacked_experts_are_saved_and_switched_like_layers(tmp_path):
    model = shaken(adapt.apply(mixture(), adapt.LoRA(rank=2), [STACKS, "attention"], "a"))
    first = logits(model)
    shaken(adapt.apply(model, adapt.LoRA(rank=3), "*.experts.down_proj", "b"))
    assert torch.equal(logits(adapt.use(model, "a")), first)
    adapt.save(model, tmp_path / "a.safetensors", "a")
    assert torch.equal(logits(adapt.load(mixture(), tmp_path / "a.safetensors")), first)
    adapt.remove(model, "a")
    assert list(adapt.adapted(model)) == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)]
    with pytest.raises(ValueError, match="DoRA cannot adapt a stack of experts"):
        adapt.apply(mixture(), adapt.DoRA(rank=2), STACKS)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacked_experts_equal_pefts_target_parameters(family, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def base():
        if family == "mixtral":
            return mixture()
        torch.manual_seed(0)  # GPT-OSS stores (experts, in, out)
        config = transformers.GptOssConfig(
            vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, pad_token_id=0, attn_implementation="eager",
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    peft = shaken(get_peft_model(base(), config)).eval()
    peft.save_pretrained(tmp_path / "theirs")
    wanted = logits(peft)
    assert not close(logits(base()), wanted, 1e-2)
    ours = adapt.load_peft(base(), tmp_path / "theirs")
    assert close(logits(ours), wanted)
    adapt.save_peft(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert close(logits(again), wanted)


# Patches


def test_patch_convolutions_are_adapted_as_linear_maps_of_patches():
    torch.manual_seed(0)
    for method in (adapt.LoRA(rank=2, alpha=6), adapt.DoRA(rank=2), adapt.IA3(), adapt.IA3(feedforward=("*",))):
        model = nn.Sequential(nn.Conv2d(3, 8, kernel_size=4, stride=4), nn.Conv2d(8, 8, 3, padding=1)).double()
        x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
        before = model(x)
        adapt.apply(model, method, "0")
        assert torch.equal(model(x), before)
        shaken(model)
        wanted = F.conv2d(x, model[0].weight, model[0].bias, stride=4)
        assert (model[0](x) - wanted).abs().max() < 1e-12
        assert (model[0](x) - model[0].base(x)).abs().max() > 1e-2
        assert (adapt.merge(model)[0](x) - wanted).abs().max() < 1e-12
    with pytest.raises(ValueError, match="target '1' matches no linear layer"):
        adapt.apply(model, adapt.LoRA(rank=2), "1")  # windows that overlap are no patches


# Rows


ROWS = ["a", None, "b"]


@pytest.mark.parametrize("methods", [("LoRA", "LoRA"), ("DoRA", "PiSSA"), ("IA3", "MoRA"), ("SAID", "LoRA")])
def test_each_row_uses_its_own_adapter_as_if_run_apart(methods):
    made = {
        "LoRA": adapt.LoRA(rank=2), "DoRA": adapt.DoRA(rank=2), "PiSSA": adapt.PiSSA(rank=2), "IA3": adapt.IA3(),
        "MoRA": adapt.MoRA(rank=2), "SAID": adapt.SAID(dimension=60),
    }  # fmt: skip
    model = oracle("llama2")
    for name, method in zip("ab", methods, strict=True):
        shaken(adapt.apply(model, made[method], "all-linear", name, modules_to_save=["lm_head"]))
    alone = []
    for row, name in zip(TOKENS, ROWS, strict=True):
        adapt.use(model, name)
        alone.append(logits(model, row[None]))
    with adapt.per_row(model, ROWS):
        together = logits(model)
    assert close(together, torch.cat(alone), 1e-6)
    assert not close(alone[0], alone[2].expand_as(alone[0]), 1e-2)


def test_rows_are_checked_and_forgotten():
    model = shaken(adapt.apply(oracle("llama2"), adapt.LoRA(rank=2), "attention", "a"))
    used = logits(model)
    with pytest.raises(ValueError, match="unknown adapter 'c'"), adapt.per_row(model, ["c"]):
        pass
    refused = pytest.raises(ValueError, match=r"names adapters for 2 rows, but a layer was given \(3, 7, 32\)")
    with refused, adapt.per_row(model, ["a", None]):
        logits(model)
    assert torch.equal(logits(model), used)
    experts = adapt.apply(mixture(), adapt.LoRA(rank=2), STACKS)
    refused = pytest.raises(ValueError, match="belongs to an expert, which is given tokens and not rows")
    with refused, adapt.per_row(experts, ["default", None, None]):
        pass


# What is reached


def test_coverage_counts_what_is_left_out_and_all_linear_says_so():
    model = mixture()
    with pytest.warns(CoverageWarning, match=r"all-linear reaches \d+% .* stacked experts \(model.layers.\*.mlp"):
        adapt.apply(model, adapt.LoRA(rank=2), "all-linear")
    found = adapt.coverage(model)
    plain = sum(p.numel() for p in mixture().parameters())
    assert found.weights == plain
    assert found.left_out["stacked experts"] == 3 * 4 * 3 * 48 * 32
    assert found.reached == 3 * (32 * 32 * 2 + 2 * 16 * 32)
    assert found.reached + sum(found.left_out.values()) == plain
    assert "of 60," in str(found) or f"{plain:,} weights reached; left out: stacked experts" in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        adapt.apply(model, adapt.LoRA(rank=2), STACKS)
        adapt.apply(oracle("llama2"), adapt.LoRA(rank=2), "all-linear")
    assert "stacked experts" not in adapt.coverage(model).left_out


def test_coverage_counts_compressed_layers_by_the_weights_they_stand_for():
    model = oracle("llama2")
    plain = sum(p.numel() for p in model.parameters())
    linears = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    compress.apply(model, compress.NF4(block=16), "all-linear")
    adapt.apply(model, adapt.LoRA(rank=2), "all-linear")
    found = adapt.coverage(model)
    assert (found.weights, found.reached) == (plain, linears)


# Bad input


def test_wrong_arguments_are_named():
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"pass an adapter, not the class: adapt\.LoRA\(\)"):
        adapt.apply(model, adapt.LoRA)
    with pytest.raises(ValueError, match=r"the model comes first: expected a torch\.nn.Module, got LoRA"):
        adapt.apply(adapt.LoRA(rank=2), model)
    with pytest.raises(ValueError, match=r"the second argument is the adapter.*got 'attention'"):
        adapt.apply(model, "attention", adapt.LoRA(rank=2))
    with pytest.raises(ValueError, match=r"targets must be a pattern.*got LoRA"):
        adapt.apply(model, adapt.LoRA(rank=2), adapt.LoRA(rank=2))
    with pytest.raises(ValueError, match=r"unknown field of LoRA 'r'.*peft's 'r' is rank= here"):
        adapt.LoRA(r=8)
    with pytest.raises(ValueError, match="unknown field of LoRA 'rnak'; did you mean 'rank'"):
        adapt.LoRA(rnak=8)
    with pytest.raises(ValueError, match="takes its fields by name"):
        adapt.LoRA(8)
    with pytest.raises(ValueError, match=r"Near misses: .*mlp.*Named sets: attention, feedforward, all-linear"):
        adapt.apply(oracle("llama2"), adapt.LoRA(rank=2), "mlp")
    with pytest.raises(ValueError, match="no targets were given"):
        adapt.apply(model, adapt.LoRA(rank=2), [])
