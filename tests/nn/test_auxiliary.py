import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paperworks.nn import auxiliary


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        auxiliary.add(y.square().mean(), "balance")
        return y


def test_nothing_is_kept_when_nobody_collects() -> None:
    Balanced()(torch.ones(2, 3))
    with auxiliary.collecting() as collected:
        pass
    assert collected.by_name == {}
    assert collected.total() is None


def test_every_part_of_a_forward_is_collected_and_summed() -> None:
    parts = nn.Sequential(Balanced(), Balanced())
    with auxiliary.collecting() as collected:
        parts(torch.ones(2, 3))
        auxiliary.add(torch.tensor(2.0), "other")
    first, second = collected.by_name["balance"]
    assert torch.equal(collected.total(), first + second + 2.0)
    assert torch.equal(collected.sums()["balance"], (first + second).detach())
    assert not collected.sums()["balance"].requires_grad


def test_the_total_carries_gradient_to_the_part() -> None:
    part = Balanced()
    with auxiliary.collecting() as collected:
        part(torch.ones(2, 3))
    collected.total().backward()
    assert part.linear.weight.grad.abs().sum() > 0


def test_of_nested_blocks_the_innermost_receives() -> None:
    with auxiliary.collecting() as outer:
        with auxiliary.collecting() as inner:
            auxiliary.add(torch.tensor(1.0), "a")
        auxiliary.add(torch.tensor(3.0), "b")
    assert list(inner.by_name) == ["a"]
    assert list(outer.by_name) == ["b"]


def test_recomputation_in_backward_does_not_count_twice() -> None:
    part = Balanced()
    x = torch.ones(2, 3, requires_grad=True)
    with auxiliary.collecting() as collected:
        y = checkpoint(part, x, use_reentrant=False)
    (y.sum() + collected.total()).backward()
    assert len(collected.by_name["balance"]) == 1


def test_another_thread_does_not_add_to_this_collection() -> None:
    with auxiliary.collecting() as collected:
        thread = threading.Thread(target=lambda: auxiliary.add(torch.tensor(1.0), "a"))
        thread.start()
        thread.join()
    assert collected.by_name == {}


def test_an_exception_ends_the_collection() -> None:
    with pytest.raises(KeyError), auxiliary.collecting() as collected:
        raise KeyError
    auxiliary.add(torch.tensor(1.0), "a")
    assert collected.by_name == {}


def test_a_value_that_is_not_a_scalar_is_refused_by_name() -> None:
    with auxiliary.collecting(), pytest.raises(ValueError, match=r"'balance' has shape \(2,\)"):
        auxiliary.add(torch.ones(2), "balance")
