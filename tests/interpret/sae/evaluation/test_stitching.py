"""Stitching: which features are new, and what lies between two dictionaries."""

import pytest
import torch

from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation import stitching

DIM = 10
KINDS = {
    "standard": lambda n: sae.Standard(latents=n, penalty=1.0),
    "weighted": lambda n: sae.Standard(latents=n, penalty=1.0, decoder="weighted"),
    "gated": lambda n: sae.Gated(latents=n, penalty=1.0),
    "jumprelu": lambda n: sae.JumpReLU(latents=n, penalty=1.0, threshold=0.1),
}


def made(kind, latents, seed):
    torch.manual_seed(seed)
    model = KINDS[kind](latents).build(DIM).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("decoder", "encoder"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=KINDS)
def pair(request):
    return made(request.param, 12, 0), made(request.param, 30, 1)


def data():
    return torch.randn(200, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_nothing_stitched_is_the_small_one_and_everything_swapped_the_large(pair):
    small, large = pair
    x = data()
    nothing = stitching.stitch(small, large, torch.tensor([], dtype=torch.int64))
    assert torch.equal(nothing(x), small(x))
    everything = stitching.stitch(small, large, torch.arange(30), torch.arange(12), bias=large.decoder_bias.detach())
    assert torch.allclose(everything(x), large(x), atol=1e-12)


def test_the_effect_of_an_insertion_is_that_of_really_inserting(pair):
    small, large = pair
    x = data()
    effects = stitching.insertion_effects(small, large, x)

    def error(model):
        return (x - model(x)).square().sum(dim=1).mean()

    for index in (0, 7, 29):
        inserted = stitching.stitch(small, large, torch.tensor([index]))
        assert inserted.latents == 13
        assert torch.allclose(error(inserted) - error(small), effects[index], atol=1e-12)


@pytest.mark.parametrize("stride", [1, 5])
def test_the_way_leads_from_one_to_the_other(pair, stride):
    small, large = pair
    x = data()
    way = list(stitching.interpolate(small, large, 0.5, x, stride))
    assert torch.equal(way[0](x), small(x))
    assert torch.allclose(sorted_rows(way[-1].decoder), sorted_rows(large.decoder), atol=1e-12)
    assert torch.allclose(way[-1](x), large(x), atol=1e-12)
    novel = int((stitching.nearest_cosines(large, small) <= 0.5).sum())
    if stride == 1:
        assert [model.latents for model in way[: novel + 1]] == list(range(12, 13 + novel))


def sorted_rows(rows):
    return rows.detach()[rows.detach()[:, 0].argsort()]


def test_groups_are_the_connected_components():
    small, large = made("standard", 4, 0), made("standard", 5, 1)
    with torch.no_grad():
        small.decoder.copy_(torch.eye(4, DIM))
        large.decoder.zero_()
        large.decoder[0, 0] = 1  # twin of 0
        large.decoder[1, :2] = 0.5**0.5  # joins 0 and 1
        large.decoder[2, 2] = 1  # two children of 2
        large.decoder[3, 2], large.decoder[3, 7] = 0.8, 0.6
        large.decoder[4, 9] = 1  # novel
    found = {(tuple(g.small.tolist()), tuple(g.large.tolist())) for g in stitching.groups(small, large, 0.7)}
    assert found == {((0, 1), (0, 1)), ((2,), (2, 3)), ((3,), ())}
    assert stitching.nearest_cosines(large, small).tolist() == pytest.approx([1, 0.5**0.5, 1, 0.8, 0])
    order = torch.randperm(4)
    with torch.no_grad():
        small.decoder.copy_(small.decoder[order])
    assert stitching.nearest_cosines(large, small).tolist() == pytest.approx([1, 0.5**0.5, 1, 0.8, 0])


@pytest.mark.parametrize(("size", "hurts"), [(0.6, False), (0.66, False), (0.67, True), (1.0, True)])
def test_doubling_an_isolated_feature_hurts_once_it_is_reconstructed_at_two_thirds(size, hurts):
    model = sae.Standard(latents=1, penalty=0.0).build(2).double()
    with torch.no_grad():
        model.decoder.copy_(torch.tensor([[1.0, 0.0]]))
        model.encoder.copy_(size * model.decoder)
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    assert bool(stitching.insertion_effects(model, model, x)[0] > 0) == hurts


def test_what_cannot_be_stitched_is_refused():
    gated, plain = made("gated", 4, 0), made("standard", 4, 0)
    topk = sae.TopK(latents=4, k=2).build(DIM)
    for one, other in ((gated, plain), (topk, topk)):
        with pytest.raises(ValueError, match="cannot be stitched: two of the same kind are needed, and not TopK"):
            stitching.stitch(one, other, torch.tensor([0]))
    with pytest.raises(ValueError, match="sizes 3 and 10"):
        stitching.nearest_cosines(plain, sae.Standard(latents=4, penalty=0.0).build(3))
    with pytest.raises(ValueError, match="subtracts the decoder's bias"):
        stitching.stitch(plain, made("weighted", 4, 0), torch.tensor([0]))
    with pytest.raises(ValueError, match="nothing is left"):
        stitching.stitch(plain, plain, torch.tensor([], dtype=torch.int64), torch.arange(4))
    with pytest.raises(ValueError, match="stride is 0"):
        next(stitching.interpolate(plain, plain, 0.5, data(), 0))
