"""Sparse gradients in the one loop: the same norm, clipping and weights as of dense ones, however rows repeat."""

import pytest
import torch
from torch import nn

from paperworks import train


class Lookup(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 3, sparse=sparse)


def loss(model, ids):
    return (model.table(ids) ** 2).sum()


@pytest.mark.parametrize("ids", [[1, 1, 2], [4, 0, 4, 4], [0, 2, 5], [3], [5, 1]])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_sparse_gradient_counts_as_the_dense_one(ids, clip):
    found = {}
    for sparse in (False, True):
        model = Lookup(sparse)
        settings = train.Settings(
            steps=3,
            lr=0.1,
            schedule="constant",
            warmup=0,
            optimizer=train.SGD(),
            clip=clip,
            save_every=None,
            progress=False,
        )
        seen = []
        report = train.fit(
            model,
            loss,
            [torch.tensor(ids)] * 3,
            settings,
            on_step=lambda _, model=model, seen=seen: seen.append(model.table.weight.detach().clone()),
        )
        found[sparse] = torch.stack([*seen, torch.zeros(6, 3).fill_(sum(report.losses))])
    torch.testing.assert_close(found[True], found[False])


def test_rows_that_repeat_in_order_are_summed_before_the_norm():
    from paperworks.train.step import _coalesced

    repeated = torch.sparse_coo_tensor(torch.tensor([[1, 1, 2]]), torch.ones(3, 2), (4, 2), check_invariants=True)
    assert _coalesced(repeated)._nnz() == 2
    ordered = torch.sparse_coo_tensor(torch.tensor([[1, 2]]), torch.ones(2, 2), (4, 2), check_invariants=True)
    assert _coalesced(ordered).is_coalesced()
    assert _coalesced(ordered).values().data_ptr() == ordered._values().data_ptr()  # and nothing is copied
