"""Every adapter on every weight format in every architecture: adapters never ask what the base is made of."""

import pytest
import torch
from torch.nn import functional as F

from paperworks import adapt, compress
from paperworks.checkpoints import from_transformers
from tests.parity.families import oracle

ADAPTERS = {"LoRA": adapt.LoRA(rank=2, alpha=4), "rsLoRA": adapt.LoRA(rank=2, alpha=4, rank_stabilized=True)}
FORMATS = {
    "float32": None,
    "NF4": compress.NF4(),
    "NF4 twice": compress.NF4(double_quantization=True),
    "FP4": compress.FP4(),
    "int4": compress.Int4(),
    "Q8_0": compress.GGML(kind="Q8_0"),
    "Q4_0": compress.GGML(kind="Q4_0"),
}
MODELS = {
    "gpt2": lambda: from_transformers(oracle("gpt2")),
    "llama": lambda: from_transformers(oracle("llama2")),
    "gemma2": lambda: from_transformers(oracle("gemma2")),
    "transformers' llama": lambda: oracle("llama2"),
    "transformers' gpt2": lambda: oracle("gpt2"),
}
TOKENS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    out = model(TOKENS)
    return out if torch.is_tensor(out) else out.logits


def loss(model):
    return F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.fixture(params=[(f, m) for f in FORMATS for m in MODELS], ids=lambda pair: " in ".join(pair))
def base(request):
    form, name = request.param
    model = MODELS[name]()
    if FORMATS[form] is not None:
        compress.apply(model, FORMATS[form], targets="attention")
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_train_disable_save_and_merge_on_every_format_and_model(base, adapter, tmp_path):
    with torch.no_grad():
        before = logits(base)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapt.apply(base, ADAPTERS[adapter], targets="attention")
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
    first = loss(base)
    for _ in range(2):  # the first step moves `up` alone: `down` has no gradient while `up` is zero
        optimizer.zero_grad()
        loss(base).backward()
        optimizer.step()
    assert loss(base) < first
    assert all(parameter.grad is None for parameter in base.parameters() if not parameter.requires_grad)
    state = {name.replace(".base.", "."): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    with torch.no_grad(), adapt.disabled(base):
        assert torch.equal(logits(base), before)
    with torch.no_grad():
        trained = logits(base)
    adapt.save(base, tmp_path / "a.safetensors")
    adapt.remove(base)
    adapt.load(base, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(logits(base), trained)
    wanted = {path: module.decoded_weight().clone() for path, module in adapt.adapted(base).items()}
    formats = {path: getattr(module.base, "format", None) for path, module in adapt.adapted(base).items()}
    adapt.merge(base)
    for path, weight in wanted.items():
        module = base.get_submodule(path)
        merged = adapt.delta.weight_of(module)
        assert getattr(module, "format", None) == formats[path]
        # merging rounds to the format again: by half the widest gap of its codes (FP4 1/6, NF4 0.152) at most
        allowed = 1e-6 if formats[path] is None else 0.167 * float(weight.detach().abs().max())
        assert (merged - weight).abs().max() <= allowed
