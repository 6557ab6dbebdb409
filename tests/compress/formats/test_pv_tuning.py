import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks import compress, train
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.aqlm import AQLM
from paperworks.compress.formats.kmeans_vq import KMeansVQ
from paperworks.compress.formats.pv_tuning import PVTuning, largest_groups, tunable, v_step
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.linear import CompressedLinear

SHAPE = (12, 16)
VQ = KMeansVQ(group=4, codes=8, clustering=2)
ADDITIVE = AQLM(codebooks=2, bits=3, group=4, epochs=0, clustering=3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curved(seed=5):
    """A quadratic loss tr((W - A) H (W - A)^T) / 2 as (A, H)."""
    x = normal(40, 16, seed=seed) * torch.logspace(0, -1, 16)
    return normal(*SHAPE, seed=seed + 1), x.T @ x / 40


def value(weight, goal, moment):
    return float((((weight - goal) @ moment) * (weight - goal)).sum().double() / 2)


def everything():
    return torch.ones(12, 4, dtype=torch.bool)


def exact_values(stored, goal, moment):
    """The codebook with the least loss for these codes: a linear system in its 32 numbers, float64."""
    codes = VQ.unpack(stored["codes"], SHAPE)[..., 0].long()
    uses = F.one_hot(codes, 8).double()  # (rows, groups, codes)
    spread = torch.einsum("rgc,de->rgdce", uses, torch.eye(4).double()).reshape(12, 16, 32)
    curvature = torch.einsum("rix,ij,rjy->xy", spread, moment.double(), spread)
    slope = torch.einsum("rix,ij,rj->x", spread, moment.double(), goal.double())
    return stored | {"codebook": (torch.linalg.pinv(curvature) @ slope).view(8, 4).float()}


def test_exact_p_and_v_steps_never_raise_the_loss():
    goal, moment = curved()
    rate = 1 / float(torch.linalg.eigvalsh(moment)[-1])
    stored = VQ.encode(normal(*SHAPE, seed=9))
    for name in stored:
        stored[name] = stored[name].float() if stored[name].is_floating_point() else stored[name]
    losses, changed = [value(VQ.decode(stored, SHAPE), goal, moment)], 0
    for share in (1.0, 0.1, 1.0, 0.3, 1.0, 1.0):
        stored = exact_values(stored, goal, moment)
        weight = VQ.decode(stored, SHAPE)
        losses.append(value(weight, goal, moment))
        gradient = (weight - goal) @ moment
        moved = v_step(VQ, stored, SHAPE, weight - rate * gradient, largest_groups(gradient, 4, share))
        changed += int((VQ.unpack(moved["codes"], SHAPE) != VQ.unpack(stored["codes"], SHAPE)).sum())
        stored = moved
        losses.append(value(VQ.decode(stored, SHAPE), goal, moment))
    assert changed >= 3
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))  # float32
    assert losses[-1] < 0.7 * losses[0]


def test_a_full_v_step_is_the_projection_of_the_gradient_step():
    goal, moment = curved()
    stored = VQ.encode(normal(*SHAPE, seed=9))
    weight = VQ.decode(stored, SHAPE)
    target = (weight - 3.0 * (weight - goal) @ moment).double()
    book = stored["codebook"].double()
    expected = torch.stack([
        torch.stack([((book - target[row, 4 * g : 4 * g + 4]) ** 2).sum(1).argmin() for g in range(4)])
        for row in range(12)
    ])  # fmt: skip
    moved = v_step(VQ, stored, SHAPE, target.float(), everything())
    assert torch.equal(VQ.unpack(moved["codes"], SHAPE)[..., 0].long(), expected)
    assert not torch.equal(moved["codes"], stored["codes"])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("form", [VQ, ADDITIVE], ids=["KMeansVQ", "AQLM"])
def test_no_more_than_the_share_of_groups_change_their_codes(form, share):
    stored = form.encode(normal(*SHAPE), Statistics.neutral(16))
    target = 3 * normal(*SHAPE, seed=3)  # far away: every group would like to change
    chosen = largest_groups(target - form.decode(stored, SHAPE), 4, share)
    assert int(chosen.sum()) == math.ceil(share * 48)
    moved = v_step(form, stored, SHAPE, target, chosen)
    differ = (form.unpack(moved["codes"], SHAPE) != form.unpack(stored["codes"], SHAPE)).any(-1)
    assert 0 < int(differ.sum()) <= math.ceil(share * 48)
    assert not (differ & ~chosen).any()
    assert all(torch.equal(moved[name], stored[name]) for name in form.continuous)


def test_the_chosen_groups_are_those_that_move_farthest():
    step = torch.ones(2, 8)
    step[0, 5], step[1, 2] = 3.0, -9.0
    assert largest_groups(step, 4, 0.5).tolist() == [[False, True], [True, False]]
    assert largest_groups(step, 4, 0.1).tolist() == [[False, False], [True, False]]


def test_small_full_gradient_steps_are_stuck_and_the_same_length_in_few_groups_is_not():
    goal, moment = curved()
    stored = VQ.encode(normal(*SHAPE, seed=9))
    weight = VQ.decode(stored, SHAPE)
    gradient = (weight - goal) @ moment
    length = 0.1 * weight.norm()
    few = largest_groups(gradient, 4, 0.02)
    inside = gradient * few.repeat_interleave(4, 1)
    full = v_step(VQ, stored, SHAPE, weight - length * gradient / gradient.norm(), everything())
    part = v_step(VQ, stored, SHAPE, weight - length * inside / inside.norm(), few)
    assert torch.equal(full["codes"], stored["codes"])
    assert int((VQ.unpack(part["codes"], SHAPE) != VQ.unpack(stored["codes"], SHAPE)).sum()) == 1
    # and plain descent with an ordinary rate never leaves the codes it starts from
    for rate in (1e-4, 1e-3, 1e-2):
        assert torch.equal(v_step(VQ, stored, SHAPE, weight - rate * gradient, everything())["codes"], stored["codes"])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_steps_equal_adam_and_the_search_written_out_in_float64(decay):
    model = nn.Sequential(CompressedLinear(VQ, normal(*SHAPE, seed=2)))
    x, y = normal(30, 16, seed=3).double(), normal(30, 12, seed=4).double()
    book = model[0].stored["codebook"].double()
    start = VQ.unpack(model[0].stored["codes"], SHAPE)[..., 0].long()
    codes, latent = start.clone(), None
    lr, code_lr, count = 1e-2, 0.3 if decay else 0.9, math.ceil(0.1 * 48)
    first, second, square = torch.zeros(8, 4).double(), torch.zeros(8, 4).double(), torch.zeros(SHAPE).double()
    with tunable(model) as (layer,):
        optimizer = PVTuning(model, lr=lr, code_lr=code_lr, share=0.1, decay=decay)
        for time in (1, 2, 3):
            held = book[codes].reshape(SHAPE)
            slope = 2 / y.numel() * (x @ held.T - y).T @ x
            entries = torch.zeros(8, 4).double().index_add_(0, codes.flatten(), slope.reshape(-1, 4))
            first, second = 0.9 * first + 0.1 * entries, 0.95 * second + 0.05 * entries**2
            book = book - lr * (first / (1 - 0.9**time)) / ((second / (1 - 0.95**time)).sqrt() + 1e-8)
            square = 0.95 * square + 0.05 * slope**2
            step = (-slope / ((square / (1 - 0.95**time)).sqrt() + 1e-8)).reshape(48, 4)
            weight = book[codes].reshape(48, 4)
            if time > 1:  # Adam's first step is +-1: no group is farther than others
                length = code_lr * weight.norm()
                if decay == 1:
                    far = step.square().sum(-1).topk(count).indices
                    target = weight.index_add(0, far, step[far] * length / step[far].norm())
                else:
                    target = (held.reshape(48, 4) if latent is None else latent) + step * length / step.norm()
                    far = (target - weight).square().sum(-1).topk(count).indices
                codes.view(-1)[far] = torch.cdist(target[far], book).argmin(1)
                latent = target
            optimizer.share = 0.1 if time > 1 else 0.0
            optimizer.zero_grad()
            F.mse_loss(model(x.float()), y.float()).backward()
            optimizer.step()
            assert torch.allclose(layer.values["codebook"].double(), book, atol=1e-5)  # float32
            assert torch.equal(VQ.unpack(layer.stored["codes"], SHAPE)[..., 0].long(), codes)
            assert not layer.probe.any()
    assert not torch.equal(codes, start)


def test_straight_through_steps_gather_until_a_code_is_crossed():
    """decay 0 keeps a latent weight: many steps too short to change a code change it together; decay 1 never does."""
    changed = {}
    for decay in (0.0, 1.0):
        model = nn.Sequential(CompressedLinear(VQ, normal(*SHAPE, seed=2)))
        x, y = normal(30, 16, seed=3), normal(30, 12, seed=4)
        with tunable(model):
            optimizer = PVTuning(model, lr=1e-4, code_lr=0.05, share=1.0, decay=decay)
            counts = []
            for _ in range(30):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                counts.append(optimizer.changed)
        changed[decay] = counts
    assert changed[0.0][0] == 0
    assert sum(changed[0.0]) > 0
    assert sum(changed[1.0]) == 0


@pytest.mark.parametrize("form", [VQ, ADDITIVE], ids=["KMeansVQ", "AQLM"])
def test_the_training_loop_tunes_codes_and_values_and_the_layers_store_them(form):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(200, 16)
    y = dense(x).detach()
    batch = torch.randn(1, 200, 16)
    compress.apply(dense, form, "all-linear", calibration=[batch[0]])

    def loss(model, batch):
        return F.mse_loss(model(batch), y)

    before, held = float(loss(dense, x)), {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = train.Settings(
        steps=25, lr=1e-3, warmup=0, progress=False, save_every=None,
        optimizer=lambda groups: PVTuning(dense, 3e-3, 0.2, 0.02, decay=1.0),
    )  # fmt: skip
    with tunable(dense):
        train.fit(dense, loss, [x], settings)
        inside = float(loss(dense, x))
    after = dense.state_dict()
    assert isinstance(dense[0], CompressedLinear)
    assert float(loss(dense, x)) < 0.8 * before
    assert abs(float(loss(dense, x)) / inside - 1) < 0.02  # values go back to float16
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: held[name].dtype for name in held}
    assert not torch.equal(after["0.codes"], held["0.codes"])
    assert torch.equal(after["0.bias"], held["0.bias"])
    assert not torch.equal(after["1.weight"], held["1.weight"])  # norms learn along


def test_bits_of_the_clustered_format_are_those_stored():
    for form, shape in ((KMeansVQ(), (8, 64)), (KMeansVQ(group=1, codes=4), (5, 7)), (VQ, (3, 20))):
        stored = form.encode(normal(*shape))
        assert form.bits_per_weight(shape) == 8 * sum(t.nbytes for t in stored.values()) / (shape[0] * shape[1])
        assert torch.equal(form.reencode(form.decode(stored, shape), stored)["codes"], stored["codes"])
        assert len(form.decode(stored, shape).reshape(-1, form.group).unique(dim=0)) <= form.codes
    assert KMeansVQ().bits_per_weight((4096, 4096)) == 1 + 16 * 64 / 4096**2


def test_wrong_use_says_what_to_do():
    with pytest.raises(ValueError, match="power of two"):
        KMeansVQ(codes=12)
    with pytest.raises(ValueError, match=r"KMeansVQ.group must be at least 1"):
        KMeansVQ(group=0)
    with pytest.raises(ValueError, match=r"KMeansVQ.clustering"):
        KMeansVQ(clustering=0)
    with pytest.raises(ValueError, match="choose one that does"):
        KMeansVQ().encode(torch.zeros(2, 6))
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"call compress\.apply"), tunable(plain):
        pass
    with pytest.raises(ValueError, match="with tunable"):
        PVTuning(plain)
    with pytest.raises(ValueError, match=r"PVTuning.share must be between 0 and 1, got 2"):
        PVTuning(plain, share=2)
    rotated = nn.Sequential(CompressedLinear(QuIP(), torch.zeros(4, 8), statistics=Statistics.neutral(8)))
    with pytest.raises(ValueError, match="QuIP is none"), tunable(rotated):
        pass
    assert isinstance(rotated[0], CompressedLinear)
