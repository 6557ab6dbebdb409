import torch
from torch import nn

from paperworks.testbeds.training import fit


def test_fit_gives_every_loss_and_repeats_with_its_seed():
    def run(seed):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
        batches = [torch.ones(8, 4)]
        return fit(model, lambda m, x: (m(x) - 1).square().mean(), batches, steps=5, lr=0.1, seed=seed)

    assert len(run(0)) == 5
    assert run(0) == run(0)
    assert run(0) != run(1)
