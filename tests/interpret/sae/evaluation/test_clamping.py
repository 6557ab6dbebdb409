"""Clamping latents of a dictionary, and adding their directions."""

import pytest
import torch
import transformers

from paperworks import adapt, api, compress, interpret
from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.clamping import clamp, largest_strengths, push
from paperworks.models.presets.families import llama

TAP = "blocks.0"
TOKENS = torch.arange(14).view(2, 7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama(16, 2, 4, 44, kv_heads=2, vocab_size=50).build().double().eval()


def dictionary(dim=16, kind=None):
    """A bad autoencoder, untrained, whose decoder rows have every length."""
    torch.manual_seed(1)
    built = (kind or sae.Standard(latents=40, penalty=1.0)).build(dim).double().eval()
    with torch.no_grad():
        built.decoder_bias.normal_(std=0.3)
        built.encoder_bias.normal_(std=0.1)
        built.decoder.mul_(torch.linspace(0.2, 3.0, built.latents)[:, None])
    return built


@torch.no_grad()
def at(model, tap=TAP, tokens=TOKENS):
    with interpret.record(model, tap) as seen:
        model(tokens)
    return seen[tap]


@pytest.mark.parametrize("kind", [sae.Standard(latents=40, penalty=1.0), sae.TopK(latents=40, k=4)])
@torch.no_grad()
def test_a_clamp_replaces_latents_and_keeps_the_error(model, kind):
    own = dictionary(kind=kind)
    x = at(model)
    latents = own.encode(x)
    error = x - own.decode(latents)
    assert error.norm() > 0.1 * x.norm()  # the autoencoder is bad, and what it misses is not lost
    replaced = latents.clone()
    for latent, level in ((3, 2.5), (17, 0.0), (30, -1.5)):
        replaced[..., latent] = level / own.decoder[latent].norm()
    wanted = own.decode(replaced) + error
    with clamp(model, TAP, own, {3: 2.5, 17: 0.0, 30: -1.5}):
        found = at(model)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # float64 rounding
    activations = latents * own.decoder.norm(dim=1)
    by_rank = x.clone()
    for latent, level in ((3, 2.5), (17, 0.0), (30, -1.5)):
        by_rank += (level - activations[..., latent])[..., None] * own.decoder[latent] / own.decoder[latent].norm()
    torch.testing.assert_close(found, by_rank, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_clamp_to_the_present_activation_changes_no_bit(model):
    own = dictionary()
    x, plain = at(model), model(TOKENS)
    present = own.strength(own.encode(x))
    latent = int(present.flatten(0, 1).amax(0).argmax())
    with clamp(model, TAP, own, {latent: present[..., latent]}):
        assert torch.equal(model(TOKENS), plain)
    with clamp(model, TAP, own, {latent: 0.0}):
        gone = at(model)
        assert not torch.equal(model(TOKENS), plain)
    without = x - own.encode(x)[..., latent, None] * own.decoder[latent]
    torch.testing.assert_close(gone, without, rtol=0, atol=1e-12)
    assert torch.equal(model(TOKENS), plain)


@torch.no_grad()
def test_only_chosen_positions_and_ordinary_lengths_are_moved(model):
    own = dictionary()
    x = at(model)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    with clamp(model, TAP, own, {3: 5.0}, positions=mask):
        found = at(model)
    assert torch.equal(found[~mask], x[~mask])
    assert (found[mask] != x[mask]).any(dim=1).all()
    lengths = x.norm(dim=-1)
    longest = float(lengths.median())
    with clamp(model, TAP, own, {3: 5.0}, longest=longest):
        found = at(model)
    assert torch.equal((found != x).any(dim=-1), lengths <= longest)


@torch.no_grad()
def test_a_push_adds_a_share_of_each_length_whatever_the_latent_does(model):
    own = dictionary()
    x = at(model)
    unit = own.decoder / own.decoder.norm(dim=1, keepdim=True)
    with push(model, TAP, own, {3: 0.5, 9: -0.25}):
        found = at(model)
    wanted = x + x.norm(dim=-1, keepdim=True) * (0.5 * unit[3] - 0.25 * unit[9])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_tokens_generated_with_a_cache_are_clamped_as_without(model):
    own = dictionary()
    with clamp(model, TAP, own, {3: 40.0}):
        quick = api.generate(model, TOKENS, max_new_tokens=8, temperature=0.0)
        tokens = TOKENS
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(quick[:, -8:], tokens[:, -8:])
    plain = api.generate(model, TOKENS, max_new_tokens=8, temperature=0.0)
    assert not torch.equal(plain[:, -8:], tokens[:, -8:])


@torch.no_grad()
def test_it_clamps_models_of_other_libraries_with_their_caches():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1
    )
    other = transformers.LlamaForCausalLM(config).double().eval()
    own, tap = dictionary(), "model.layers.0"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with clamp(other, tap, own, {3: 40.0}):
        quick = other.generate(TOKENS, use_cache=True, **options)
        slow = other.generate(TOKENS, use_cache=False, **options)
    assert torch.equal(quick, slow)
    assert not torch.equal(quick, other.generate(TOKENS, **options))


@torch.no_grad()
def test_it_works_on_quantized_and_adapted_bases(model):
    model.float()
    own = dictionary().float()
    compress.apply(model, compress.Int8(), targets="all-linear")
    adapt.apply(model, adapt.LoRA(rank=2, alpha=4), targets="attention")
    for name, weight in model.named_parameters():
        if name.endswith("up"):  # LoRA starts at zero
            weight.normal_()
    x = at(model)
    with clamp(model, TAP, own, {3: 2.0}):
        found = at(model)
    moved = 2.0 - own.strength(own.encode(x))[..., 3]
    wanted = x + moved[..., None] * own.decoder[3] / own.decoder[3].norm()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # float32 rounding


@torch.no_grad()
def test_half_precision_activations_keep_their_dtype():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16)).bfloat16()
    own = dictionary().float()
    with clamp(model, "1", own, {3: 2.0}), interpret.record(model, "1") as seen:
        assert model(TOKENS).dtype == torch.bfloat16
    assert seen["1"].shape == (2, 7, 16)


def test_gradients_flow_through_a_clamp(model):
    own = dictionary().requires_grad_(False)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.Sequential(torch.nn.Identity())
    with clamp(plain, "0", own, {3: 2.0, 5: 0.0}):
        assert torch.autograd.gradcheck(plain, x)


@torch.no_grad()
def test_largest_strengths_are_those_of_all_rows():
    own = dictionary()
    rows = torch.randn(50, 16, dtype=torch.float64)
    wanted = (own.encode(rows) * own.decoder.norm(dim=1)).max(dim=0).values
    # products of other shapes add in another order: units in the last place of strengths up to 10
    assert torch.allclose(largest_strengths(own, rows), wanted, rtol=0, atol=1e-13)
    assert torch.allclose(largest_strengths(own, rows.split(7)), wanted, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="no rows"):
        largest_strengths(own, rows[:0])


@torch.no_grad()
def test_what_cannot_be_clamped_is_refused(model):
    own = dictionary()
    with pytest.raises(ValueError, match="no latent is given"):
        clamp(model, TAP, own, {})
    with pytest.raises(ValueError, match=r"no latents \[40, -1\]: the dictionary has 0 to 39"):
        clamp(model, TAP, own, {40: 1.0, -1: 1.0})
    with pytest.raises(ValueError, match="latent 3 is to be clamped to nan"):
        clamp(model, TAP, own, {3: float("nan")})
    with pytest.raises(ValueError, match="finite numbers are needed"):
        push(model, TAP, own, {3: float("inf")})
    with pytest.raises(ValueError, match="bool"):
        clamp(model, TAP, own, {3: 1.0}, positions=torch.ones(2, 7))
    short = torch.ones(2, 6, dtype=torch.bool)
    for acting, message in (
        (clamp(model, TAP, own, {3: 1.0}, positions=short), r"mask of positions has shape \(2, 6\).*\(2, 7\)"),
        (clamp(model, TAP, own, {3: torch.ones(3)}), r"level of latent 3 has shape \(3,\)"),
        (clamp(model, TAP, dictionary(8), {3: 1.0}), "activations of size 16, the autoencoder reads size 8"),
        (push(model, TAP, dictionary(8), {3: 1.0}), "activations of size 16, the autoencoder reads size 8"),
    ):
        with pytest.raises(ValueError, match=message), acting:
            model(TOKENS)
    own.decoder[5] = 0
    with pytest.raises(ValueError, match=r"latents \[5\] are zero"):
        clamp(model, TAP, own, {5: 1.0})
