"""Every adapter on every weight format in every architecture: adapters never ask what the base is made of."""

import copy
from functools import cache

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from paperworks import adapt, compress
from paperworks.checkpoints import from_transformers
from paperworks.compress import files
from paperworks.core.linear import weight_of
from paperworks.core.selection import select_linears

TOKENS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
DATA = [torch.randint(1, 97, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

ADAPTERS = {
    "LoRA": (adapt.LoRA(rank=2, alpha=4), 1e-2),
    "rsLoRA": (adapt.LoRA(rank=2, alpha=4, rank_stabilized=True), 1e-2),
    "SAID": (adapt.SAID(dimension=40), 3e-2),  # forty numbers for all layers: each must move further
    "MoRA sharing": (adapt.MoRA(rank=2, kind="sharing"), 1e-3),
    "MoRA rotation": (adapt.MoRA(rank=2, kind="rotation"), 1e-3),
    "DoRA": (adapt.DoRA(rank=2, alpha=4), 1e-2),
    "IA3": (adapt.IA3(), 1e-2),
    "PiSSA": (adapt.PiSSA(rank=2, alpha=4), 1e-3),
}
FORMATS = {
    "float32": None,
    "bf16": torch.bfloat16,
    "int8": compress.Int8(),
    "LLM.int8": compress.LLMInt8(),
    "SmoothQuant": compress.SmoothQuant(),
    "fp8": compress.FP8(),
    "NF4": compress.NF4(),
    "NF4 twice": compress.NF4(double_quantization=True),
    "FP4": compress.FP4(),
    "GPTQ-4": compress.GPTQ(bits=4, group=64),
    "GPTQ-3": compress.GPTQ(bits=3, group=64, act_order=True),
    "AWQ-4": compress.AWQ(bits=4, group=64),
    "QuIP-2": compress.QuIP(bits=2),
    "QuIP#-2": compress.QuIPSharp(bits=2, passes=1),
    "AQLM-2": compress.AQLM(epochs=1, steps=3, clustering=2),
    "Q8_0": compress.GGML(kind="Q8_0"),
    "Q6_K": compress.GGML(kind="Q6_K"),
    "Q4_K": compress.GGML(kind="Q4_K"),
    "Q2_K": compress.GGML(kind="Q2_K"),
    "2:4 sparse": compress.SparseGPT(pattern="2:4"),
    "Effort": compress.Effort(effort=0.9),
    "Ternary": compress.Ternary(),
}
SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def oracle(family: str) -> nn.Module:
    """A random model of transformers whose rows are one super-block of the k-quants."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(**SIZES, n_embd=256, n_layer=1, n_head=4, n_positions=64, n_inner=256)
    else:
        config = transformers.LlamaConfig(
            **SIZES,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # larger scores, so that attention matters
    return model


MODELS = {
    "gpt2": lambda: from_transformers(oracle("gpt2")),
    "llama": lambda: from_transformers(oracle("llama")),
    "transformers' llama": lambda: oracle("llama"),
    "transformers' gpt2": lambda: oracle("gpt2"),
}


def logits(model):
    out = model(TOKENS)
    return (out if torch.is_tensor(out) else out.logits).float()


def loss(model):
    return F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@cache
def encoded(form, name):
    """The model with its attention in the format; encoded once for all adapters."""
    model = MODELS[name]()
    format = FORMATS[form]
    if isinstance(format, torch.dtype):
        model.to(format)
    elif format is not None:
        compress.apply(model, format, targets="attention", calibration=DATA)
    return model


def fresh(form, name):
    return copy.deepcopy(encoded(form, name))


# Every pair of methods and formats; the first methods in three models, variants once, so that it stays quick.
VARIANTS = {"LLM.int8", "SmoothQuant", "NF4 twice", "QuIP-2", "Effort", "Ternary"}
READ_THE_WEIGHT = {"DoRA", "IA3", "PiSSA"}  # what they ask of a base differs with the format, not with the model
CELLS = [
    (adapter, form, name)
    for form in FORMATS
    for name in MODELS
    for adapter in ADAPTERS  # last: a model is encoded once for all of them
    if (adapter == "LoRA" and name in ("llama", "transformers' gpt2"))
    or (adapter == "rsLoRA" and (form, name) == ("NF4", "llama"))
    or (adapter in READ_THE_WEIGHT and (name == "llama" or (name == "transformers' gpt2" and form in ("bf16", "NF4"))))
    or (adapter not in {"rsLoRA"} | READ_THE_WEIGHT and form not in VARIANTS and name != "transformers' gpt2")
]
BASES = [(form, name) for form in FORMATS for name in MODELS if ("LoRA", form, name) in CELLS]


def linears(model):
    return select_linears(model, "attention")


def roundings(model, form):
    """What the format alone loses of each weight, as a share."""
    found = {path: layer.error.weight for path, layer in model.named_modules() if hasattr(layer, "error")}
    return found.__getitem__ if found else lambda path: 2.0**-9 if form == "bf16" else 1e-6


@pytest.mark.parametrize(("adapter", "form", "name"), CELLS, ids=[" in ".join(cell) for cell in CELLS])
def test_adapters_train_disable_save_and_merge_on_every_format_and_model(adapter, form, name, tmp_path):
    spec, lr = ADAPTERS[adapter]
    base = fresh(form, name)
    rounding = roundings(base, form)
    with torch.no_grad():
        before = logits(base)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    originals = {path: weight_of(module).float().clone() for path, module in linears(base).items()}

    adapt.apply(base, spec, targets="attention")
    splits = adapter == "PiSSA"  # the base holds the residual, rounded again
    with torch.no_grad():
        if splits:
            for path, layer in adapt.adapted(base).items():
                off = (layer.decoded_weight().float() - originals[path]).norm() / originals[path].norm()
                assert off <= 1.75 * rounding(path) + 1e-6, f"{path}: splitting lost {off:.4f}"
        else:
            assert torch.equal(logits(base), before)  # nothing is added at first
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=lr)
    first = loss(base)
    first.backward()
    assert all(parameter.grad is None for parameter in base.parameters() if not parameter.requires_grad)
    trained_parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained_parameters)
    optimizer.step()
    assert loss(base) < first
    state = {name.replace(".base.", "."): tensor for name, tensor in base.state_dict().items()}
    held = {path for path in originals if splits}
    kept = {name: tensor for name, tensor in frozen.items() if name.rpartition(".")[0] not in held}
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())

    with torch.no_grad(), adapt.disabled(base):
        assert splits or torch.equal(logits(base), before)
    with torch.no_grad():
        trained = logits(base)
    adapt.save(base, tmp_path / "a.safetensors")
    adapt.remove(base)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in frozen.items())
    adapt.load(base, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(logits(base), trained)

    wanted = {path: module.decoded_weight().detach().clone() for path, module in adapt.adapted(base).items()}
    formats = {path: getattr(module.base, "format", None) for path, module in adapt.adapted(base).items()}
    adapt.merge(base, lossy=True)  # one step of training is smaller than the rounding of few bits
    for path, weight in wanted.items():
        module = base.get_submodule(path)
        assert getattr(module, "format", None) == formats[path]
        lost = (weight_of(module).float() - weight.float()).norm() / weight.float().norm()
        # a rounding is half a step at most, which is sqrt(3) times its root mean square
        assert lost <= 1.75 * rounding(path) + 1e-6, f"{path}: merging lost {lost:.4f}"
    with torch.no_grad():
        assert torch.isfinite(logits(base)).all()


@pytest.mark.parametrize(("form", "name"), BASES, ids=[" in ".join(pair) for pair in BASES])
def test_without_adapters_gradients_pass_through_every_format(form, name):
    base = fresh(form, name)
    plain = compress.decompress(copy.deepcopy(base))
    gradients = {}
    for name, model in (("stored", base), ("decoded", plain)):
        embedding = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
        model.requires_grad_(False)
        embedding.requires_grad_(True)
        loss(model).backward()
        gradients[name] = embedding.grad.float()
    apart = (gradients["stored"] - gradients["decoded"]).norm() / gradients["decoded"].norm()
    # formats that round activations too differ by that rounding; effort 0.9 leaves out a tenth of the products
    own = {"LLM.int8": 0.1, "SmoothQuant": 0.1, "Ternary": 0.1, "fp8": 0.2, "Effort": 0.2}
    assert apart <= own.get(form, 1e-4)


@pytest.mark.parametrize(("form", "name"), BASES, ids=[" in ".join(pair) for pair in BASES])
def test_compressed_layers_round_trip_bit_for_bit(form, name, tmp_path):
    base = fresh(form, name)
    if not files.describe(base):  # plain weights: nothing of ours to store
        assert form in ("float32", "bf16")
        return
    compress.save(base, tmp_path / "layers.safetensors")
    loaded = compress.load(MODELS[name](), tmp_path / "layers.safetensors")
    with torch.no_grad():
        assert torch.equal(logits(loaded), logits(base))
    stored = sum(layer.bytes for layer in compress.report(base).layers)
    header = 3000 * len(compress.report(base).layers) + 3000
    assert (tmp_path / "layers.safetensors").stat().st_size <= stored + header


def test_an_adapter_smaller_than_the_rounding_is_not_merged_silently():
    model = fresh("QuIP#-2", "llama")
    adapt.apply(model, adapt.LoRA(rank=1), targets="attention")
    with torch.no_grad():
        for layer in adapt.adapted(model).values():
            layer.delta.up.fill_(1e-6)
        before = logits(model)
    with pytest.raises(ValueError, match=r"(?s)rounds the adapter away.*lossy=True"):
        adapt.merge(model)
    with torch.no_grad():
        assert torch.equal(logits(model), before)
