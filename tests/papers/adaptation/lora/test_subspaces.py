import pytest
import torch

from paperworks.papers.adaptation.lora.subspaces import subspace_similarity


def draw(rows, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_equal_to_the_formula_written_out():
    one, other = draw(3), draw(5, seed=1)
    found = subspace_similarity(one, other)
    u = torch.linalg.svd(one.double())[2]
    v = torch.linalg.svd(other.double())[2]
    for i in range(1, 4):
        for j in range(1, 6):
            expected = torch.linalg.matrix_norm(u[:i] @ v[:j].T) ** 2 / min(i, j)
            assert abs(found[i - 1, j - 1] - expected) < 1e-12


def test_a_subspace_within_another_gives_one_and_an_orthogonal_one_zero():
    whole = draw(6)
    mixed = draw(6, 6, seed=2) @ whole
    assert (subspace_similarity(whole, mixed)[-1, -1] - 1).abs() < 1e-12
    assert (subspace_similarity(whole[:2], whole)[:, -1] - 1).abs().max() < 1e-12
    apart = torch.eye(10)
    assert subspace_similarity(apart[:4], apart[4:]).abs().max() < 1e-24


def test_random_subspaces_share_what_chance_gives_them():
    found = torch.stack([subspace_similarity(draw(2, seed=s), draw(8, seed=100 + s)) for s in range(100)]).mean(0)
    assert (found[1, 7] - 8 / 40).abs() < 0.02
    assert (found[0, 0] - 1 / 40).abs() < 0.02


def test_bad_input():
    for other, shape in ((draw(2, 39), r"\(2, 39\)"), (draw(2)[0], r"\(40,\)")):
        with pytest.raises(ValueError, match=r"same number of columns.*got shapes \(2, 40\) and " + shape):
            subspace_similarity(draw(2), other)
    with pytest.raises(ValueError, match="NaN or infinity"):
        subspace_similarity(draw(2), draw(2) * float("nan"))
