from dataclasses import replace

import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.train.optim.paging import PagedAdamWOptimizer
from tests.train.small import classifier, examples, mean_loss, same_bits, weights

SETTINGS = train.Settings(steps=12, lr=3e-2, optimizer=train.AdamW(weight_decay=0.1), progress=False, save_every=5)

PAGED = replace(SETTINGS, optimizer=train.PagedAdamW(budget=600, page=64, weight_decay=0.1))


def parameters(dtype=torch.float32, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shapes = [(37, 29), (300,), (), (64, 8)]
    return [nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for shape in shapes]


def take(optimizer, held, steps, seed=1):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in held:
            parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pages_in_budget", [1, 3, 100])
def test_it_equals_torchs_adamw_bit_for_bit(dtype, pages_in_budget):
    held, plain = parameters(dtype), parameters(dtype)
    size = 64 * 2 * held[0].element_size()
    paged = PagedAdamWOptimizer(held, budget=pages_in_budget * size, page=64, lr=1e-2, weight_decay=0.1)
    ordinary = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1, fused=True)
    take(paged, held, 5)
    take(ordinary, plain, 5)
    assert all(torch.equal(one, other) for one, other in zip(held, plain, strict=True))
    saved, wanted = paged.state_dict()["state"], ordinary.state_dict()["state"]
    assert all(torch.equal(saved[i][name], wanted[i][name]) for i in wanted for name in wanted[i])
    assert paged.most_resident <= paged.budget


def test_pages_leave_when_the_budget_is_full_the_oldest_first():
    held = [nn.Parameter(torch.zeros(64)) for _ in range(3)]
    paged = PagedAdamWOptimizer(held, budget=2 * 512, page=64)  # two pages of 2 x 64 float32
    for used in (0, 1, 0, 2, 0):  # 1 was used longest ago when 2 needs room, so 0 is there still
        for parameter in held:
            parameter.grad = None
        held[used].grad = torch.ones(64)
        paged.step()
    assert paged.moved == 3 * 512
    assert paged.resident == paged.most_resident == 2 * 512
    held[0].grad, held[1].grad = None, torch.ones(64)
    paged.step()
    assert paged.moved == 4 * 512


def test_with_room_for_all_nothing_is_moved_twice():
    held = parameters()
    paged = PagedAdamWOptimizer(held, budget=10**6, page=64)
    take(paged, held, 1)
    before = paged.moved
    take(paged, held, 3)
    assert paged.moved == before == sum(2 * 4 * parameter.numel() for parameter in held)


def test_training_goes_through_the_one_loop_with_the_same_weights():
    plain, paged = classifier(), classifier()
    train.fit(plain, mean_loss, examples(), SETTINGS)
    train.fit(paged, mean_loss, examples(), PAGED)
    assert same_bits(weights(plain), weights(paged))


def test_a_paged_run_resumes_bit_for_bit(tmp_path):
    whole, broken, resumed = classifier(), classifier(), classifier()
    train.fit(whole, mean_loss, examples(), PAGED)
    train.fit(broken, mean_loss, examples(), PAGED, run_dir=tmp_path, on_step=lambda s: s == 7)
    train.fit(resumed, mean_loss, examples(), PAGED, run_dir=tmp_path)
    assert same_bits(weights(whole), weights(resumed))


def test_it_takes_over_the_state_of_an_ordinary_adamw():
    held, plain = parameters(), parameters()
    paged = PagedAdamWOptimizer(held, budget=512, page=64, lr=1e-2)
    ordinary = torch.optim.AdamW(plain, lr=1e-2, fused=True)
    take(ordinary, plain, 3)
    with torch.no_grad():
        for one, other in zip(held, plain, strict=True):
            one.copy_(other)
    take(paged, held, 1)  # pages from before must not survive
    with torch.no_grad():
        for one, other in zip(held, plain, strict=True):
            one.copy_(other)
    paged.load_state_dict(ordinary.state_dict())
    take(paged, held, 2, seed=5)
    take(ordinary, plain, 2, seed=5)
    assert all(torch.equal(one, other) for one, other in zip(held, plain, strict=True))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="a budget of 100 bytes does not hold one page, which takes 512"):
        PagedAdamWOptimizer(parameters(), budget=100, page=64)
    with pytest.raises(ValueError, match=r"PagedAdamW\.page is 10; it must be a positive multiple of 64 numbers"):
        train.PagedAdamW(budget=10_000, page=10)
    with pytest.raises(ValueError, match=r"PagedAdamW\.budget is 0; it must be above 0 bytes"):
        train.PagedAdamW(budget=0)
    with pytest.raises(ValueError, match="page must be a positive multiple of 64 numbers, got 10"):
        PagedAdamWOptimizer(parameters(), budget=10_000, page=10)
    with pytest.raises(ValueError, match="takes no closure"):
        PagedAdamWOptimizer(parameters(), budget=10**6).step(lambda: None)
