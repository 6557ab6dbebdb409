import math

import pytest
import torch
from torch import nn

from paperworks import adapt

KINDS = ("sharing", "grouped", "grouped-tiled", "tiled-grouped", "decoupling", "rotation", "truncation")
SHAPES = [(24, 24), (40, 24), (24, 40), (37, 29), (64, 16), (16, 64)]


def layer(inputs, outputs):
    return adapt.LayerInfo(in_features=inputs, out_features=outputs)


def square(inputs, outputs, kind, rank=2):
    delta = adapt.MoRA(rank=rank, kind=kind).build(layer(inputs, outputs)).double()
    nn.init.normal_(delta.square)
    return delta


def groups(count, side):
    """The group of each feature, one by one."""
    small = count // side
    sizes = [small + 1 if group < count - side * small else small for group in range(side)]
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def naive(delta, x):
    """The paper's equations, one number at a time."""
    matrix, inputs, outputs, kind = delta.square.detach(), delta.in_features, delta.out_features, delta.kind
    side, pieces = len(matrix), math.ceil(inputs / len(matrix))
    padded = [x[j % inputs].item() for j in range(pieces * side)]
    if kind in ("decoupling", "rotation"):
        joined = []
        for piece in range(pieces):
            part = torch.tensor(padded[piece * side : (piece + 1) * side], dtype=torch.float64)
            if kind == "rotation":
                turned = torch.zeros(side, dtype=torch.float64)
                for i in range(side // 2):
                    angle = piece * 10_000 ** (-2 * i / side)
                    one, other = part[i], part[i + side // 2]
                    turned[i] = one * math.cos(angle) - other * math.sin(angle)
                    turned[i + side // 2] = other * math.cos(angle) + one * math.sin(angle)
                part = turned
            joined += (matrix @ part).tolist()
        return torch.tensor([joined[i % len(joined)] for i in range(outputs)], dtype=torch.float64)
    slots = torch.zeros(side, dtype=torch.float64)
    if kind == "truncation":
        slots += x[:side]
        return torch.cat((matrix @ slots, torch.zeros(outputs - side, dtype=torch.float64)))
    if kind in ("grouped", "grouped-tiled"):
        for j, group in enumerate(groups(inputs, side)):
            slots[group] += x[j]
    else:
        for j, value in enumerate(padded):
            slots[j % side] += value
    y = matrix @ slots
    places = groups(outputs, side) if kind in ("grouped", "tiled-grouped") else [i % side for i in range(outputs)]
    return y[places]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_kind_equals_its_equations(kind, shape):
    delta, x = square(*shape, kind, rank=1), torch.randn(2, 3, shape[0], dtype=torch.float64)
    out = delta(x, torch.zeros(2, 3, shape[1], dtype=torch.float64))
    assert out.shape == (2, 3, shape[1])
    expected = torch.stack([naive(delta, row) for row in x.flatten(0, 1)]).view_as(out)
    assert (out - expected).abs().max() < 1e-12
    assert (x @ delta.weight().T - expected).abs().max() < 1e-12


def test_it_has_as_many_parameters_as_lora():
    """Section 3: in = out = 4096 and r = 8 give a side of 256 and 65,536 parameters."""
    adapter = adapt.MoRA(rank=8, kind="sharing")
    assert adapter.side(4096, 4096) == 256
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in made.build(layer(4096, 4096)).parameters())
            for made in (adapter, adapt.LoRA(rank=8))
        ]
    assert counts == [65_536, 65_536]
    assert adapt.MoRA(rank=8).side(576, 192) == 78  # sqrt(6144) = 78.4, rounded and even
    assert adapt.MoRA(rank=1, kind="sharing").side(30, 12) == 6  # 6.48
    assert adapt.MoRA(rank=1, kind="sharing").side(31, 12) == 7  # 6.56 is rounded, not cut


def test_the_rank_is_that_of_the_square_or_with_rotations_that_of_the_layer():
    for kind in ("sharing", "grouped", "grouped-tiled", "tiled-grouped"):
        for shape in SHAPES:
            delta = square(*shape, kind, rank=1)
            assert torch.linalg.matrix_rank(delta.weight()) == len(delta.square)
    for shape in [(24, 24), (24, 40), (40, 40)]:
        assert torch.linalg.matrix_rank(square(*shape, "rotation", rank=1).weight()) == min(shape)


def test_sharing_is_a_matrix_of_tiles_where_the_sizes_divide():
    delta = square(32, 32, "sharing", rank=1)  # side 8
    i, j = torch.arange(32)[:, None] % 8, torch.arange(32) % 8
    assert (delta.weight() - delta.square[i, j]).abs().max() < 1e-12


def test_rotations_leave_out_inputs_whose_outputs_are_cut_off():
    """576 -> 192 at rank 8: pieces of 78 outputs, so that three fill the output and only 234 inputs matter."""
    weight = square(576, 192, "rotation", rank=8).weight()
    assert (weight[:, :234].abs().amax(0) > 0).all()
    assert (weight[:, 234:] == 0).all()


def test_nothing_changes_at_first_and_the_square_alone_is_trained():
    model, x = nn.Sequential(nn.Linear(24, 24)), torch.randn(3, 24)
    before = model(x)
    adapt.apply(model, adapt.MoRA(rank=1), "*")
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.deltas.default.square"]
    assert (model[0].delta.square.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind):
    model, x = nn.Sequential(nn.Linear(37, 29)), torch.randn(3, 37)
    adapt.apply(model, adapt.MoRA(rank=2, kind=kind), "*")
    nn.init.normal_(model[0].delta.square)
    before = model(x)
    assert (adapt.merge(model)(x) - before).abs().max() < 1e-5 * before.abs().max()  # float32


def test_remora_merges_resets_and_changes_the_mapping(tmp_path):
    model, x = (
        adapt.apply(nn.Sequential(nn.Linear(24, 24)), adapt.MoRA(rank=1, kind="sharing"), "*"),
        torch.randn(3, 24),
    )
    start = model[0].base.weight.clone()
    delta = model[0].delta
    optimizer = torch.optim.AdamW([delta.square], lr=1e-2)
    for phase in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        before = model(x).detach()
        adapt.remora(model, optimizer)
        assert (delta.square == 0).all()
        assert delta.square not in optimizer.state
        assert (model(x) - before).abs().max() < 1e-5
        assert int(delta.phase) == phase + 1
    side = len(delta.square)
    assert torch.linalg.matrix_rank((model[0].base.weight - start).double(), rtol=1e-4) > side
    nn.init.normal_(delta.square)
    adapt.save(model, tmp_path / "a.safetensors")
    again = adapt.load(nn.Sequential(model[0].base), tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))  # the phase is in the file


def test_remora_refuses_other_adapters_and_changes_nothing():
    model = adapt.apply(nn.Sequential(nn.Linear(24, 24)), adapt.LoRA(rank=1), "*")
    with pytest.raises(ValueError, match="0 uses a LowRankDelta; only MoRA can be restarted"):
        adapt.remora(model)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"MoRA\.rank must be at least 1, got 0"):
        adapt.MoRA(rank=0)
    with pytest.raises(ValueError, match=r"MoRA\.kind must be one of"):
        adapt.MoRA(kind="other")
    with pytest.raises(ValueError, match="rank 30 needs a 38 x 38 matrix on a 24 x 24 layer"):
        adapt.MoRA(rank=30).build(layer(24, 24))
