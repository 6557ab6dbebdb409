"""What each of several processes runs in `test_processes.py`: `python several.py SCENARIO FOLDER`."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from paperworks import train
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, Experts, GatedMLP, RMSNorm, RoPE, TopKRouter
from paperworks.nn.feedforward.experts.parallel import ParallelExperts
from paperworks.train.distributed import distribution
from tests.train.small import classifier, examples, mean_loss, summed_loss

SETTINGS = train.Settings(steps=6, lr=1e-2, log_every=1, save_every=3, progress=False, clip=0.5)


def language_model() -> nn.Module:
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=GatedMLP(hidden=24))
    return Decoder(vocab_size=19, dim=16, depth=2, block=block, norm=RMSNorm(), tied=True).build()


def texts(rows: int = 4, count: int = 5) -> list[dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, 19, (rows, 12), generator=draws)
        targets = torch.randint(0, 19, (rows, 12), generator=draws)
        targets[torch.rand(rows, 12, generator=draws) < 0.3] = -100  # rows count unequal numbers of tokens
        made.append({"tokens": tokens, "targets": targets})
    return made


class Uneven(nn.Module):
    """Two experts; the second one takes part only where the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = x[:, 0] > 0
        out = self.one(x)
        return out + positive[:, None] * self.other(x) if bool(positive.any()) else out


def one_sided(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose first half of rows never reaches the second expert."""
    made = examples(count, 6)
    for x, _ in made:
        x[:, 0] = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    return made


def fitted(model: nn.Module, loss, batches, settings: train.Settings, **options) -> dict:
    report = train.fit(model, loss, batches, settings, **options)
    logged = [{k: v for k, v in record.items() if k != "seconds"} for record in report.records]
    return {"losses": report.losses, "records": logged, "counted": report.counted}


def everything(folder: Path) -> dict:
    """Several runs that must come out as they do in one process."""
    found = {}
    found["text"] = fitted(language_model(), train.next_token_loss, texts(), SETTINGS, run_dir=folder / "text")
    found["uneven rows"] = fitted(language_model(), train.next_token_loss, texts(rows=5), SETTINGS)
    found["means"] = fitted(classifier(), mean_loss, examples(size=5), SETTINGS)
    found["whole micro-batches"] = fitted(classifier(), summed_loss, examples(size=1), replace(SETTINGS, accumulate=4))
    found["unused expert"] = fitted(Uneven(), summed_loss, one_sided(), SETTINGS)
    sharded = replace(SETTINGS, sharded=True)
    model = language_model()
    found["sharded"] = fitted(model, train.next_token_loss, texts(), sharded, run_dir=folder / "sharded")
    if distribution.processes() == 1:
        found["state"] = {name: tensor.tolist() for name, tensor in train.full_state(model).items()}
    return found


def dropout(folder: Path) -> dict:
    """Draws of the processes differ, and the order of batches, drawn from the same generator, does not."""
    seen: list[int] = []

    def batches(epoch: int):
        for index in torch.randperm(6).tolist():
            seen.append(index)
            yield examples()[index]

    model = classifier(dropout=0.5)
    masks = []
    model[2].register_forward_hook(lambda module, args, out: masks.append(out.detach()[:2].ne(0).flatten().tolist()))
    fitted(model, mean_loss, batches, replace(SETTINGS, steps=12))
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return {"order": seen, "masks": masks, "weights": weights}


def resumed(folder: Path) -> dict:
    """Go on from what another number of processes saved."""
    longer = replace(SETTINGS, schedule="constant", warmup=0)
    plain = fitted(language_model(), train.next_token_loss, texts(), longer, run_dir=folder / "plain")
    sharded = replace(longer, sharded=True)
    shared = fitted(language_model(), train.next_token_loss, texts(), sharded, run_dir=folder / "shared")
    return {"plain": plain, "shared": shared}


def killed(folder: Path) -> dict:
    """One process is killed in the middle of step 5."""

    def loss(model, batch):
        loss.calls += 1
        if loss.calls == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return train.next_token_loss(model, batch)

    loss.calls = 0
    return fitted(language_model(), loss, texts(), replace(SETTINGS, schedule="constant", warmup=0), run_dir=folder)


def diverged(folder: Path) -> dict:
    """One process's share of a batch is not finite."""
    batches = examples(size=6)
    batches[2][0][5] = torch.inf  # the last row: the last process's
    try:
        train.fit(classifier(), mean_loss, batches, SETTINGS)
    except train.Diverged as error:
        return {"message": str(error)}
    return {"message": "nothing was wrong"}


ROUTER = TopKRouter(softmax="before", balance=0.1, z=0.01)
STEADY = replace(SETTINGS, schedule="constant", warmup=0)


def mixture(kind: type[Experts] = ParallelExperts) -> nn.Module:
    """A language model with four experts a block; join the processes first, that each may keep its share."""
    torch.manual_seed(0)
    experts = kind(expert=GatedMLP(hidden=12), count=4, router=ROUTER, capacity=0.8)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=2, position=RoPE()), feedforward=experts)
    return Decoder(vocab_size=19, dim=16, depth=2, block=block, norm=RMSNorm()).build()


def only_experts(model: nn.Module) -> nn.Module:
    """Leave to train what the processes keep for themselves, in two layers, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    return model


def frozen_experts(model: nn.Module, moved: str = "none of them") -> nn.Module:
    """Train everything else; the parameters of one name are another's than those drawn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name)
        if moved in name:
            parameter.detach().add_(1.0)
    return model


def refusal(model: nn.Module, run_dir: Path | None = None, **settings) -> str:
    try:
        train.fit(model, train.next_token_loss, texts(), replace(SETTINGS, **settings), run_dir=run_dir)
    except ValueError as error:
        return str(error)
    return "nothing was wrong"


def experts(folder: Path) -> dict:
    """Experts that every process keeps, and experts that are spread: both as in one process."""
    found = {}
    with distribution.joined(None):
        fitting = (train.next_token_loss, texts(rows=5))
        found["kept"] = fitted(mixture(Experts), *fitting, SETTINGS)
        model = mixture()
        found["spread"] = fitted(model, *fitting, SETTINGS, run_dir=folder / "spread")
        found["numbers"] = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        state = train.full_state(model)
        found["state"] = {name: state[name].tolist() for name in sorted(state)}
        found["whole micro-batches"] = fitted(mixture(), *fitting, replace(SETTINGS, accumulate=2))
        found["computed again"] = fitted(train.recompute(mixture()), *fitting, SETTINGS)
        found["frozen"] = fitted(only_experts(mixture()), *fitting, SETTINGS, run_dir=folder / "frozen")
        found["left out"] = fitted(frozen_experts(mixture()), *fitting, SETTINGS, run_dir=folder / "left out")
        if distribution.is_first():
            again("spread", folder, folder / "own")
        distribution.wait()
        for origin, name in (("own", "spread"), ("others", "spread"), ("others", "frozen")):
            if (place := folder / origin / name).exists():
                model = mixture() if name == "spread" else only_experts(mixture())
                found[f"{origin}, {name}"] = fitted(model, *fitting, SETTINGS, run_dir=place)
        if distribution.processes() > 1:
            found["refused"] = [
                refusal(mixture(), sharded=True),
                refusal(mixture(), precision="float16"),
                refusal(only_experts(mixture()), run_dir=folder / "spread"),
                refusal(frozen_experts(mixture(), "experts.3.up"), run_dir=folder / "left out"),
            ]
    return found


def again(name: str, source: Path, target: Path) -> None:
    """Copy a run as it was after three steps."""
    step = Path(name) / "checkpoints" / "step-000003"
    shutil.copytree(source / step, target / step)


def experts_killed(folder: Path) -> dict:
    """One process is killed in step 5 while the other waits for its tokens."""
    with distribution.joined(None):
        model = mixture()

        def die(module: nn.Module, given: object) -> None:
            die.calls += 1
            if die.calls == 5 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

        die.calls = 0
        model.blocks[1].feedforward.router.register_forward_pre_hook(die)
        return fitted(model, train.next_token_loss, texts(rows=5), STEADY, run_dir=folder / "whole")


def too_few(folder: Path) -> dict:
    """A batch of one row among two processes."""
    try:
        train.fit(classifier(), mean_loss, examples(size=1), SETTINGS)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": "nothing was wrong"}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    result = globals()[name](folder)
    (folder / f"{name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
