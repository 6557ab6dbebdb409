"""Distillation from a teacher's likeliest token."""

import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.train.distillation import Top1Distillation, top1_distillation_sum


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, vocab, seed):
        super().__init__()
        self.table = nn.Parameter(drawn(vocab, vocab, seed=seed))

    def forward(self, tokens, segments=None):
        return self.table[tokens]


def test_the_gradient_is_the_mixture_of_both():
    """The catalogue: 0.1 (p - y) + 0.9 (p - onehot(teacher's argmax))."""
    logits = drawn(5, 7).requires_grad_()
    targets, taught = torch.tensor([0, 3, 6, -100, 2]), torch.tensor([1, 3, 5, 4, 0])
    top1_distillation_sum(logits, targets, taught).backward()
    p, one = logits.detach().softmax(-1), torch.eye(7, dtype=torch.float64)
    for row in range(5):
        expected = 0.1 * (p[row] - one[targets[row]]) + 0.9 * (p[row] - one[taught[row]]) if row != 3 else 0 * p[row]
        assert (logits.grad[row] - expected).abs().max() < 1e-15


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mixture_of_cross_entropies(weight):
    logits, targets, taught = drawn(4, 5), torch.tensor([0, 1, -100, 4]), torch.tensor([2, 1, 0, 3])
    logs = logits.log_softmax(-1)
    expected = -sum((1 - weight) * logs[row, targets[row]] + weight * logs[row, taught[row]] for row in (0, 1, 3))
    assert float(top1_distillation_sum(logits, targets, taught, weight)) == pytest.approx(float(expected), abs=1e-12)


def test_in_the_loop_the_teacher_is_asked_and_left_alone():
    student, teacher = Table(6, 0), Table(6, 1)
    before = teacher.table.detach().clone()
    tokens = torch.randint(0, 6, (3, 8), generator=torch.Generator().manual_seed(0))
    total, count = Top1Distillation(teacher)(student, tokens)
    wanted = top1_distillation_sum(
        student(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), before[tokens][:, :-1].argmax(-1).flatten()
    )
    assert int(count) == 3 * 7
    assert float(total) == pytest.approx(float(wanted), abs=1e-10)
    settings = train.Settings(steps=3, save_every=None, progress=False)
    train.fit(student, Top1Distillation(teacher), [tokens], settings)
    assert torch.equal(teacher.table, before)
    assert teacher.table.grad is None
    assert teacher.training


def test_segments_and_targets_are_those_of_next_token_loss():
    student, teacher = Table(6, 0), Table(6, 1)
    tokens = torch.randint(0, 6, (2, 8), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8])
    _, count = Top1Distillation(teacher)(student, {"tokens": tokens, "segments": segments})
    assert int(count) == int(train.next_token_loss(student, {"tokens": tokens, "segments": segments})[1])
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    plain, _ = train.next_token_loss(student, batch)
    assert float(Top1Distillation(teacher, weight=0.0)(student, batch)[0]) == pytest.approx(float(plain), rel=1e-6)


def test_what_does_not_fit_is_refused():
    logits, targets = drawn(4, 5), torch.zeros(4, dtype=torch.int64)
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"weight must be in \[0, 1\]"):
            top1_distillation_sum(logits, targets, targets, weight)
        with pytest.raises(ValueError, match=r"weight must be in \[0, 1\]"):
            Top1Distillation(Table(6, 0), weight)
    with pytest.raises(ValueError, match="one target and one taught token a row"):
        top1_distillation_sum(logits, targets, targets[:3])
    with pytest.raises(ValueError, match="over one vocabulary"):
        Top1Distillation(Table(7, 1))(Table(6, 0), torch.zeros(1, 3, dtype=torch.int64))
