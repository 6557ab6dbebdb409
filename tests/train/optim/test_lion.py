"""Lion against its equations in float64, and against bitsandbytes."""

import pytest
import torch

from paperworks import train

LR, DECAY, BETAS = 3e-3, 0.1, (0.9, 0.99)


def gradients(steps: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draws, dtype=torch.float64) for _ in range(steps)]


def test_steps_are_those_of_the_equations() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    w, m = weight.tolist(), [0.0] * 7
    optimizer = train.Lion(betas=BETAS).build([{"params": [weight], "lr": LR, "weight_decay": DECAY}])
    for gradient in gradients(20, 7):
        weight.grad = gradient.clone()
        optimizer.step()
        for i, g in enumerate(gradient.tolist()):
            c = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            w[i] -= LR * ((c > 0) - (c < 0) + DECAY * w[i])
            m[i] = BETAS[1] * m[i] + (1 - BETAS[1]) * g
    # 20 steps of a few float64 roundings at values near 1
    assert (weight - torch.tensor(w, dtype=torch.float64)).abs().max() < 1e-14


def test_steps_are_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    start = torch.randn(64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = train.Lion(betas=BETAS).build([{"params": [ours], "lr": LR, "weight_decay": DECAY}])
    other = bitsandbytes.optim.Lion([theirs], lr=LR, betas=BETAS, weight_decay=DECAY, optim_bits=32)
    for gradient in gradients(20, 64, seed=2):
        for weight, optimizer in ((ours, one), (theirs, other)):
            weight.grad = gradient.float()
            optimizer.step()
    # 20 updates of float32 weights of at most 3, each rounded twice; a sign that differs would be off by 2 * LR
    assert (ours - theirs).abs().max() < 1e-5


def test_every_number_moves_by_the_rate_whatever_the_size_of_its_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = train.Lion().build([{"params": [weight], "lr": LR}])
    weight.grad = torch.tensor([1e-9, -1e9, 0.0], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == [-LR, LR, 0.0]
