"""The end-to-end loss against its formula, and what it may and may not touch."""

import pytest
import torch

from paperworks import interpret, train
from paperworks.interpret import sae
from paperworks.models.presets.families import llama

TOKENS = torch.arange(14).view(2, 7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama(16, 3, 4, 44, kv_heads=2, vocab_size=50).build().double().eval()


def autoencoder(latents=40):
    torch.manual_seed(1)
    return sae.Standard(latents=latents, penalty=0.0, decoder="weighted").build(16).double()


def identity():
    made = autoencoder(32)
    with torch.no_grad():
        both = torch.cat([torch.eye(16), -torch.eye(16)]).double()
        made.encoder.copy_(both)
        made.decoder.copy_(both)
    return made


def test_the_loss_is_its_formula_in_every_term(model):
    made = autoencoder()
    loss = sae.EndToEnd(
        model,
        "blocks.0",
        steps=10,
        warmup=0.0,
        sparsity=1.5,
        kl=0.5,
        reconstruction=0.3,
        downstream=2.5,
        later=["blocks.1", "blocks.2"],
    )
    value, metrics = loss(made, TOKENS)
    with torch.no_grad():
        with interpret.record(model, "blocks.*") as clean:
            p = model(TOKENS).softmax(-1)
        a = clean["blocks.0"]
        f = torch.relu(a @ made.encoder.T + made.encoder_bias)
        back = f @ made.decoder + made.decoder_bias
        with interpret.edit(model, {"blocks.0": lambda _: back}), interpret.record(model, "blocks.{1,2}") as spliced:
            q = model(TOKENS).softmax(-1)
        kl = (p * (p / q).log()).sum(-1).mean()
        sparsity = (f * made.decoder.norm(dim=1)).sum(-1).mean() / 16
        apart = sum((clean[path] - spliced[path]).pow(2).mean() for path in ("blocks.1", "blocks.2")) / 2
        expected = 0.5 * kl + 1.5 * sparsity + 0.3 * (a - back).pow(2).mean() + 2.5 * apart
    assert torch.allclose(value, expected, rtol=1e-10)
    assert metrics["kl"] == pytest.approx(kl.item())
    assert metrics["downstream"] == pytest.approx(apart.item())


def test_the_divergence_is_of_the_spliced_from_the_clean_in_this_order(model):
    loss = sae.EndToEnd(model, "blocks.0", steps=10, sparsity=0.0)
    made = autoencoder()
    value = loss(made, TOKENS)[0]
    with torch.no_grad():
        clean = model(TOKENS).log_softmax(-1)
        with sae.splice(model, "blocks.0", made):
            spliced = model(TOKENS).log_softmax(-1)
    forward = torch.nn.functional.kl_div(spliced, clean, log_target=True, reduction="none").sum(-1).mean()
    backward = torch.nn.functional.kl_div(clean, spliced, log_target=True, reduction="none").sum(-1).mean()
    assert torch.allclose(value, forward)
    assert not torch.allclose(value, backward)


def test_an_autoencoder_that_changes_nothing_costs_nothing(model):
    loss = sae.EndToEnd(model, "blocks.0", steps=10, sparsity=0.0, downstream=1.0, later=["blocks.2"])
    value, metrics = loss(identity(), TOKENS)
    assert value.abs() < 1e-12
    assert metrics["downstream"] < 1e-20


def test_gradients_reach_the_autoencoder_only(model):
    made = autoencoder()
    loss = sae.EndToEnd(model, "blocks.0", steps=10, sparsity=1.0, downstream=1.0, later=["blocks.2"])
    loss(made, TOKENS)[0].backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())


def test_it_trains_in_the_one_loop():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(16, 10))
    x, made = torch.randn(64, 16), autoencoder().float()
    loss = sae.EndToEnd(base, "0", steps=60, sparsity=0.0)
    before = loss(made, x)[0].item()
    settings = train.Settings(
        steps=60, lr=1e-2, warmup=0, optimizer=train.AdamW(weight_decay=0.0), save_every=None, progress=False
    )
    train.fit(made, loss, [x], settings, on_step=sae.Training(made, 60).after_step)
    assert loss(made, x)[0].item() < 0.5 * before
    assert int(made.steps_taken) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -1.0}, "sparsity is -1.0"),
        ({"sparsity": 1.0, "kl": 0.0}, "nothing says what is to be kept"),
        ({"sparsity": 1.0, "downstream": 1.0}, "give both or neither"),
        ({"sparsity": 1.0, "later": ["blocks.2"]}, "give both or neither"),
        ({"sparsity": 1.0, "steps": 0}, "steps is 0"),
    ],
)
def test_impossible_losses_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sae.EndToEnd(model, "blocks.0", **({"steps": 5} | options))


def test_wrong_sizes_and_outputs_are_refused(model):
    loss = sae.EndToEnd(model, "blocks.0", steps=5, sparsity=1.0)
    with pytest.raises(ValueError, match="reads activations of size 8"):
        loss(sae.Standard(latents=9, penalty=0.0, decoder="weighted").build(8), TOKENS)
    odd = torch.nn.Sequential(torch.nn.Identity(), torch.nn.LSTM(3, 3))
    with pytest.raises(ValueError, match="the model returned tuple"):
        sae.EndToEnd(odd, "0", steps=5, sparsity=1.0)(autoencoder(), torch.zeros(2, 4, 3))
