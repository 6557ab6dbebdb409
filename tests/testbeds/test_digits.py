"""The drawn digits: the same for the same seed, each told from the others, and noise only where it is asked for."""

import torch

from paperworks.testbeds.digits import draw


def test_a_seed_decides_every_picture():
    one, same, other = draw(50, 1), draw(50, 1), draw(50, 2)
    assert torch.equal(one.pictures, same.pictures)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.pictures, other.pictures)


def test_pictures_have_the_asked_size_and_ink_between_0_and_1():
    for side in (8, 16):
        digits = draw(200, 0, side=side, noise=0.0)
        assert digits.pictures.shape == (200, side, side)
        assert 0 <= digits.pictures.min() <= digits.pictures.max() <= 1
        assert digits.pictures.flatten(1).amax(1).min() > 0.5  # no empty picture
    assert set(digits.labels.tolist()) == set(range(10))


def test_ten_digits_are_told_apart_by_their_means_better_than_by_chance():
    seen, asked = draw(2000, 3), draw(1000, 4)
    means = torch.stack([seen.pictures[seen.labels == digit].mean(0) for digit in range(10)]).flatten(1)
    nearest = torch.cdist(asked.pictures.flatten(1), means).argmin(1)
    assert (nearest == asked.labels).float().mean() > 0.5  # 0.1 by chance
