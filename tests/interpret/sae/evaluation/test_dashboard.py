import pytest
import torch
from torch import nn

from paperworks.interpret import record, sae
from paperworks.interpret.sae.evaluation.dashboard import AROUND, BINS, Excerpt, FeatureView, feature_views
from paperworks.models.presets.families import llama

TAP = "blocks.0"
BATCHES = list(torch.randint(50, (12, 40), generator=torch.Generator().manual_seed(0)).split(4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama(32, 2, 4, 48, vocab_size=50).build().eval()


@pytest.fixture(scope="module")
def dictionary():
    torch.manual_seed(1)
    return sae.TopK(latents=64, k=4).build(32).eval()


@torch.no_grad()
def strengths(model, dictionary):
    tokens = torch.cat(BATCHES)
    with record(model, TAP) as seen:
        model(tokens)
    found = dictionary.strength(dictionary.encode(seen[TAP]))
    found[:, 0] = 0
    return tokens, found


def test_density_histogram_and_excerpts_are_those_of_the_latents(model, dictionary):
    tokens, found = strengths(model, dictionary)
    views = feature_views(model, TAP, dictionary, BATCHES, excerpts=5)
    assert [view.index for view in views] == (found.flatten(0, 1) > 0).any(0).nonzero()[:, 0].tolist()
    for view in views:
        own = found[..., view.index]
        assert view.density == pytest.approx(int((own > 0).sum()) / (12 * 39))
        assert view.largest == pytest.approx(float(own.max()), rel=1e-5)
        assert len(view.histogram) == BINS
        assert sum(view.histogram) == int((own > 0).sum())
        peaks = own.amax(1)
        wanted = peaks[peaks > 0].sort(descending=True).values[:5]
        torch.testing.assert_close(torch.tensor([max(x.activations) for x in view.excerpts]), wanted)
        for excerpt in view.excerpts:
            assert excerpt.activations[excerpt.strongest] == max(excerpt.activations)
            assert len(excerpt.tokens) == len(excerpt.activations) <= 2 * AROUND + 1
            assert any(list(excerpt.tokens) == row[i : i + len(excerpt.tokens)].tolist()
                       for row in tokens for i in range(40 - len(excerpt.tokens) + 1))  # fmt: skip


def test_promoted_tokens_are_those_whose_logit_the_direction_raises(model, dictionary):
    (view,) = feature_views(model, TAP, dictionary, BATCHES, [3], tokens=4)
    direction = dictionary.decoder[3].detach().double()
    effect = (model.unembedding.weight.double() * model.norm.weight.double()) @ direction / direction.norm()
    effect = (effect - effect.mean()).detach()
    assert [token for token, _ in view.promoted] == effect.argsort(descending=True)[:4].tolist()
    assert [token for token, _ in view.suppressed] == effect.argsort()[:4].tolist()
    assert view.promoted[0][1] == pytest.approx(float(effect.max()), rel=1e-5)


def test_neighbours_are_the_nearest_living_rows_without_itself(model, dictionary):
    _, found = strengths(model, dictionary)
    alive = (found.flatten(0, 1) > 0).any(0)
    (view,) = feature_views(model, TAP, dictionary, BATCHES, [int(alive.nonzero()[0])])
    rows = nn.functional.normalize(dictionary.decoder.detach(), dim=1)
    cosines = rows @ rows[view.index]
    cosines[view.index], cosines[~alive] = -2, -2
    assert [index for index, _ in view.neighbours] == cosines.argsort(descending=True)[:8].tolist()


def test_typical_latents_are_chosen_and_any_module_will_do(model, dictionary):
    views = feature_views(model, TAP, dictionary, BATCHES, most=7)
    assert len(views) == 7
    assert [view.index for view in views] == sorted(view.index for view in views)
    plain = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32))
    views = feature_views(plain, "1", dictionary, BATCHES, most=3)
    assert views[0].promoted == ()
    assert views[0].excerpts


def test_what_cannot_be_shown_is_refused(model, dictionary):
    with pytest.raises(ValueError, match="no latents \\[64\\]"):
        feature_views(model, TAP, dictionary, BATCHES, [64])
    with pytest.raises(ValueError, match="activations of size 16"):
        feature_views(model, TAP, sae.TopK(latents=8, k=1).build(16), BATCHES)
    silent = sae.Standard(latents=8, penalty=0.0).build(32)
    with torch.no_grad():
        silent.encoder_bias.fill_(-1e6)
    with pytest.raises(ValueError, match="no latent is on"):
        feature_views(model, TAP, silent, BATCHES)


def test_the_tap_is_noted_beside_the_weights(dictionary, tmp_path):
    sae.save(dictionary, tmp_path / "one", tap=TAP)
    assert sae.noted_tap(tmp_path / "one") == TAP
    sae.save(dictionary, tmp_path / "two")
    assert sae.noted_tap(tmp_path / "two") is None
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        sae.noted_tap(tmp_path)


def test_agreement_is_the_share_of_the_commonest_strongest_token():
    def view(*strongest, histogram=(0,) * BINS):
        excerpts = tuple(Excerpt((7, token, 9), (0.0, 1.0, 0.0), 1) for token in strongest)
        return FeatureView(0, 0.1, 1.0, tuple(histogram), excerpts, (), (), ())

    assert view(3, 3, 5, 3).agreement == 0.75
    assert view(1, 2, 3, 4).agreement == 0.25
    assert view().agreement == 0.0
    half = [1] * (BINS // 2) + [3] * (BINS // 2)
    assert view(1, histogram=half).strong == 0.75
    assert view(1).strong == 0.0
