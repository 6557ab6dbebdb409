"""Models of any modality: a ViT of a few lines, from the parts that language models are made of."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import paperworks as pw
from paperworks import adapt, compress, interpret, train
from paperworks.models import Block, LayerScale, ModelSpec, PostNorm, Stack, StackModel
from paperworks.nn import GRU, MLP, Attention, Cache, LayerNorm, NoNorm, Placement, RMSNorm, TargetPlacement


@dataclass(frozen=True, kw_only=True)
class TinyViT(Stack):
    """Images (batch, 1, size, size) -> logits of classes."""

    size: int
    patch: int
    classes: int

    def build(self) -> "TinyViTModel":
        return TinyViTModel(self).initialized()


class TinyViTModel(StackModel):
    def __init__(self, spec: TinyViT) -> None:
        super().__init__(spec)
        self.head = nn.Linear(spec.dim, spec.classes)

    def _build_input(self) -> None:
        spec = self.spec
        self.patches = nn.Linear(spec.patch**2, spec.dim)
        self.places = nn.Parameter(0.02 * torch.randn((spec.size // spec.patch) ** 2, spec.dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = self.spec.patch
        patches = images[:, 0].unfold(1, size, size).unfold(2, size, size).flatten(3).flatten(1, 2)
        return self.head(super().forward(self.patches(patches) + self.places).mean(1))


def spec(**changes):
    block = Block(norm=LayerNorm(), mixer=Attention(heads=2, causal=False), feedforward=MLP(hidden=32))
    fields = {"dim": 16, "depth": 2, "block": block, "norm": LayerNorm(), "size": 8, "patch": 4, "classes": 3}
    return TinyViT(**(fields | changes))


def images(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(model, steps=60):
    return train.fit(model, loss, [images()], train.Settings(steps=steps, lr=1e-2, progress=False))


def test_a_vit_builds_counts_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    model = pw.build(spec())
    assert pw.count_parameters(spec()) == sum(parameter.numel() for parameter in model.parameters())
    report = trained(model)
    assert report.losses[-1] < 0.5 * report.losses[0]
    model.eval()
    pw.save(model, tmp_path / "vit")
    again = pw.load(tmp_path / "vit")
    assert again.spec == spec()
    assert torch.equal(again(images()[0]), model(images()[0]))


def test_a_vit_takes_adapters_formats_and_recording():
    torch.manual_seed(0)
    model = pw.build(spec()).eval()
    before = model(images()[0])
    with interpret.record(model, ["blocks.*", "blocks.*.mixer.pattern"]) as seen:
        assert torch.equal(model(images()[0]), before)
    assert seen["blocks.1"].shape == (12, 4, 16)
    assert seen["blocks.0.mixer.pattern"].shape == (12, 2, 4, 4)
    compress.apply(model, compress.NF4(block=16), targets="blocks.*.feedforward.*")
    adapt.apply(model, adapt.LoRA(rank=2), targets="attention")
    assert 0 < (model(images()[0]) - before).abs().max() < 0.1
    frozen = model.patches.weight.clone()
    report = trained(model, 20)
    assert report.losses[-1] < report.losses[0]
    assert torch.equal(model.patches.weight, frozen)


def test_a_vit_is_calibrated_block_by_block():
    torch.manual_seed(0)
    model = pw.build(spec()).eval()
    before = model(images()[0])
    compress.apply(model, compress.GPTQ(bits=8, group=16), targets="blocks.*", calibration=[images()[0]])
    assert 0 < (model(images()[0]) - before).abs().max() < 0.02


def test_a_stack_alone_maps_vectors_to_vectors_with_a_cache():
    torch.manual_seed(0)
    stack = pw.build(Stack(dim=8, depth=2, block=Block(norm=RMSNorm(), mixer=Attention(heads=2)), norm=RMSNorm()))
    stack = stack.double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    whole, cache = stack(x), stack.new_cache(2, 6)
    assert isinstance(cache, Cache)
    parts = [stack(part, Placement(cache=cache)) for part in x.split([3, 1, 2], 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12


def test_layer_scale_starts_near_the_identity_and_equals_its_equation():
    block = Block(
        norm=LayerNorm(), mixer=Attention(heads=2), feedforward=MLP(hidden=16), arrangement=LayerScale(start=1e-3)
    )
    module = block.build(8).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    placement = Placement().resolve(1, 5, x.device)
    assert 0 < (module(x, placement) - x).abs().max() < 1e-3
    with torch.no_grad():
        module.mixer_post_norm.weight.uniform_(-1, 1)
        module.feedforward_post_norm.weight.uniform_(-1, 1)
    middle = x + module.mixer_post_norm.weight * module.mixer(module.mixer_norm(x), placement)
    expected = middle + module.feedforward_post_norm.weight * module.feedforward(module.feedforward_norm(middle))
    assert (module(x, placement) - expected).abs().max() < 1e-14
    assert Block.from_dict(block.to_dict()) == block


def test_what_a_model_spec_refuses():
    with pytest.raises(TypeError, match="whole model, got Attention"):
        pw.build(Attention(heads=1))
    with pytest.raises(ValueError, match="depth must be at least 1"):
        spec(depth=0)
    with pytest.raises(ValueError, match="2 specs but depth is 3"):
        spec(depth=3, block=(spec().block, spec().block))
    with pytest.raises(TypeError, match="needs an attribute `spec`"):
        pw.save(nn.Linear(2, 2), "unused")
    deep = spec(depth=10**9)  # says so, and costs nothing
    assert isinstance(deep, ModelSpec)
    assert deep.layers() == 10**9
    assert deep.distinct_blocks == (spec().block,)


def test_mixers_that_cannot_obey_a_mask_are_named():
    block = Block(norm=NoNorm(), mixer=GRU(), arrangement=PostNorm())
    stack = pw.build(Stack(dim=4, depth=1, block=block, norm=None))
    with pytest.raises(ValueError, match=r"blocks\.0 mixes by GRUModule"):
        stack(torch.zeros(1, 2, 4), TargetPlacement(attention_mask=torch.eye(2, dtype=torch.bool)))


def test_blocks_may_differ():
    mixed = spec(block=(spec().block, replace(spec().block, mixer=GRU())))
    assert pw.build(mixed)(images()[0]).shape == (12, 3)
