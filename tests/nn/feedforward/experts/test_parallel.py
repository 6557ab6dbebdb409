"""Experts over three processes against one process that keeps all: outputs, gradients, losses, capacity, weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import paperworks as pw
from paperworks.core import processes
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, Experts, GatedMLP, NoisyTopKRouter, RMSNorm, TopKRouter, auxiliary
from paperworks.nn.feedforward.experts.parallel import Elsewhere, ParallelExperts

WORKERS, COUNT, DIM = 3, 6, 8
EXPERT = GatedMLP(hidden=12)
SWITCH = TopKRouter(softmax="before", balance=0.5, z=0.25)
MIXTURES = {
    "two": Experts(expert=EXPERT, count=COUNT),
    "one, with losses": Experts(expert=EXPERT, count=COUNT, top=1, router=SWITCH),
    "shared": Experts(expert=EXPERT, count=COUNT, shared=1),
    "capacity": Experts(expert=EXPERT, count=COUNT, router=SWITCH, capacity=0.7),
    "capacity of one choice": Experts(expert=EXPERT, count=COUNT, top=1, router=SWITCH, capacity=0.5),
    "noisy": Experts(expert=EXPERT, count=COUNT, router=NoisyTopKRouter(importance=0.5, load=0.25)),
    "starved": Experts(expert=EXPERT, count=COUNT, router=SWITCH),
}
SHARES = {"uneven": [(0, 4), (4, 5), (5, 7)], "one without rows": [(0, 5), (5, 5), (5, 7)]}


def rows():
    x = torch.randn(7, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1.0
    return x


def made(spec, name=""):
    """The module, the same numbers drawn for every expert; of "starved" no token chooses experts 1, 4 and 5."""
    torch.manual_seed(0)
    module = spec.build(DIM).double()
    with torch.no_grad():
        for parameter in module.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        if name == "starved":
            module.router.logits.weight[[1, 4, 5], 0] = -100.0
    return module


def worked(module, x, upstream, together=True):
    """Go forward and back as the training loop does: auxiliary losses count by this process's tokens."""
    x = x.clone().requires_grad_()
    with processes.one_batch(together):
        with auxiliary.collecting() as collected:
            out = module(x)
        losses = collected.sums()
        goal = (out * upstream).sum() + (collected.total() or 0) * x.shape[0] * x.shape[1]
        goal.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "gradients": gradients, "losses": losses}


def in_step(values: torch.Tensor) -> torch.Tensor:
    """Stand in for noise, so that a token's does not depend on where it is: a function of its own logits."""
    return torch.cos(7 * values.detach())


def language_model(mixture):
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2), feedforward=mixture)
    return Decoder(vocab_size=9, dim=DIM, depth=2, block=block, norm=RMSNorm(), init_std=0.3).build().double()


def refused(function, *arguments):
    try:
        function(*arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.randn_like = in_step
    early = ParallelExperts.of(MIXTURES["two"]).build(DIM).double()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORKERS), rank=rank, world_size=WORKERS)
    found = {}
    for cut, shares in SHARES.items():
        mine = slice(*shares[rank])
        for name, spec in MIXTURES.items():
            module = made(ParallelExperts.of(spec), name)
            found[cut, name] = worked(module, rows()[mine], rows()[mine].cos())
        apart = made(ParallelExperts.of(MIXTURES["capacity"]))
        found[cut, "apart"] = worked(apart, rows()[mine], rows()[mine].cos(), together=False)
    module = made(ParallelExperts.of(MIXTURES["starved"]), "starved").eval()
    module(rows()).sum().backward()  # without a gradient of the input, and in evaluation: nobody may wait for ever
    found["evaluated"] = {name: parameter.grad for name, parameter in module.named_parameters()}
    narrow = made(ParallelExperts.of(MIXTURES["starved"]), "starved").float()
    with torch.autocast("cpu", torch.bfloat16):
        found["narrow"] = narrow(rows().float())
    found["drawn"] = language_model(ParallelExperts.of(MIXTURES["two"])).state_dict()
    other = made(ParallelExperts.of(MIXTURES["two"]))
    other.load_state_dict(torch.load(f"{folder}/whole.pt", weights_only=True))
    found["loaded"] = other.state_dict()
    found["numbers"] = sum(p.numel() for p in other.experts.parameters())
    found["errors"] = [
        refused(ParallelExperts(expert=EXPERT, count=4).build, DIM),
        refused(early, rows()),
        refused(other.experts[2 * ((rank + 1) % WORKERS)], rows()),
    ]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    other = Experts(expert=EXPERT, count=COUNT).build(DIM).double()
    torch.save(other.state_dict(), folder / "whole.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))  # they import this file
        multiprocessing.start_processes(worker, (str(folder),), nprocs=WORKERS, start_method="spawn")
    everybodys = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]
    return everybodys, other.state_dict()


def close(one, other):
    assert one.shape == other.shape
    assert (one - other).abs().max() < 1e-12 if one.numel() else True


@pytest.mark.parametrize("cut", SHARES)
@pytest.mark.parametrize("name", MIXTURES)
def test_processes_compute_what_one_does(found, cut, name, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", in_step)
    parts = [each[cut, name] for each in found[0]]
    whole = worked(made(MIXTURES[name], name), rows(), rows().cos())
    for value in ("out", "x"):
        close(torch.cat([part[value] for part in parts]), whole[value])
    for path, gradient in whole["gradients"].items():
        theirs = [part["gradients"][path] for part in parts if path in part["gradients"]]
        if path.startswith("experts."):
            assert len(theirs) == 1  # one process keeps it, and its gradient is of all tokens
        else:
            assert len(theirs) == WORKERS
        close(sum(theirs), gradient)
    assert whole["losses"].keys() == ({"two": set(), "shared": set(), "noisy": {"importance", "load"}}).get(
        name, {"balance", "router z"}
    )
    for part in parts:
        for loss, value in whole["losses"].items():
            close(part["losses"][loss], value)
    if "capacity" in name:
        assert bool((whole["out"] == 0).all(-1).any())  # it was a limit
    if name == "starved":
        assert not whole["gradients"]["experts.4.up.weight"].any()


@pytest.mark.parametrize("cut", SHARES)
def test_outside_one_batch_capacity_and_losses_are_those_of_a_processs_own_rows(found, cut):
    for each, share in zip(found[0], SHARES[cut], strict=True):
        mine = rows()[slice(*share)]
        alone = worked(made(MIXTURES["capacity"]), mine, mine.cos())
        close(each[cut, "apart"]["out"], alone["out"])
        for loss, value in alone["losses"].items():
            close(each[cut, "apart"]["losses"][loss], value)


def test_nobody_waits_for_a_process_without_tokens(found):
    for rank, each in enumerate(found[0]):
        grads = each["evaluated"]
        assert all(gradient is not None for gradient in grads.values())
        assert bool(grads[f"experts.{2 * rank}.up.weight"].any()) == (rank < 2)  # no token for experts 4 and 5
        assert torch.isfinite(each["narrow"]).all()


def test_a_process_keeps_its_share_of_the_weights_under_their_names(found):
    everybodys, other = found
    whole = language_model(MIXTURES["two"]).state_dict()
    for rank, each in enumerate(everybodys):
        for states, state in ((each["drawn"], whole), (each["loaded"], other)):
            missing = {int(name.split("experts.")[1][0]) for name in state.keys() - states.keys()}
            assert missing == set(range(COUNT)) - {2 * rank, 2 * rank + 1}
            assert all(torch.equal(tensor, state[name]) for name, tensor in states.items())
        assert each["numbers"] == 3 * 12 * DIM * COUNT // WORKERS


def test_what_cannot_be_says_why(found):
    for odd, early, absent in (each["errors"] for each in found[0]):
        assert "ParallelExperts.count is 4, which 3 processes cannot share evenly" in odd
        assert "built in 1 processes and now there are 3: join the processes before the model is built" in early
        assert "kept by another process" in absent


def test_alone_it_is_experts_and_states_load_either_way():
    spec = MIXTURES["capacity"]
    assert ParallelExperts.of(spec).to_dict().items() >= {"count": COUNT, "capacity": 0.7}.items()
    ours, plain = made(ParallelExperts.of(spec)), made(spec)
    assert not any(isinstance(module, Elsewhere) for module in ours.modules())
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    with processes.one_batch():
        assert torch.equal(ours(rows()), plain(rows()))
    assert not processes.paths_kept_apart(ours)


def test_a_process_loads_its_share_of_a_folder_and_does_not_save_it_as_the_whole(tmp_path, monkeypatch):
    whole = language_model(ParallelExperts.of(MIXTURES["two"]))
    pw.save(whole, tmp_path / "whole")
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    part = pw.load(tmp_path / "whole")
    kept = [not isinstance(expert, Elsewhere) for expert in part.blocks[1].feedforward.experts]
    assert kept == [False, False, True, True, False, False]
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in part.state_dict().items())
    for write in (pw.save, pw.export):
        with pytest.raises(ValueError, match="only its share of the experts"):
            write(part, tmp_path / "part")
