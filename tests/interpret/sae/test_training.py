"""Training in the one loop: unit rows, projected gradients, resampling, resuming."""

import pytest
import torch

from paperworks import train
from paperworks.interpret import sae

QUIET = {"schedule": "constant", "warmup": 0, "progress": False, "log_every": 5}


def fit(model, steps=20, data=None, **options):
    data = data or sae.Planted(features=24, dim=8, rate=0.1)
    training = sae.Training(model, options.pop("total", steps), **options.pop("training", {}))
    optimizer = train.AdamW(weight_decay=0.0) if training.resampling is None else training.optimizer
    settings = train.Settings(steps=steps, lr=1e-2, optimizer=optimizer, seed=0, save_every=None, **QUIET)
    report = train.fit(
        model, training.loss, lambda epoch: data.batches(64, 20), settings, on_step=training.after_step, **options
    )
    return training, report


@pytest.mark.parametrize(
    "spec",
    [
        sae.Standard(latents=24, penalty=0.1),
        sae.Gated(latents=24, penalty=0.1),
        sae.TopK(latents=24, k=3, aux_k=4, dead_after=128),
        sae.JumpReLU(latents=24, penalty=0.01, threshold=0.1, bandwidth=0.1),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_rows_have_length_one_after_every_step_and_the_loss_falls(spec):
    model = spec.build(8)
    lengths = []
    training = sae.Training(model, 60)

    def after(step):
        training.after_step(step)
        lengths.append((model.decoder.norm(dim=1) - 1).abs().max().item())

    data = sae.Planted(features=24, dim=8, rate=0.1)
    settings = train.Settings(steps=60, lr=1e-2, seed=0, save_every=None, **QUIET)
    report = train.fit(model, training.loss, lambda epoch: data.batches(64, 60), settings, on_step=after)
    assert max(lengths) < 1e-6
    assert int(model.steps_taken) == 60
    errors = [record["error"] for record in report.records]
    assert errors[-1] < 0.8 * errors[0]
    assert {"error", "l0"} <= report.records[0].keys()


def test_the_weighted_kinds_rows_are_free():
    model = sae.Standard(latents=24, penalty=0.1, decoder="weighted").build(8)
    fit(model)
    assert (model.decoder.norm(dim=1) - 0.1).abs().max() > 0.01


def test_the_decoders_gradient_is_orthogonal_to_its_rows():
    torch.manual_seed(0)
    model = sae.Standard(latents=24, penalty=0.1).build(8)
    model.loss(torch.randn(32, 8), 1.0)[0].backward()
    along = (model.decoder.grad * model.decoder).sum(dim=1)
    assert along.abs().max() < 1e-6
    assert model.decoder.grad.abs().max() > 1e-2


def test_resampling_points_the_dead_at_bad_inputs_and_forgets_their_moments():
    torch.manual_seed(0)
    data = sae.Planted(features=24, dim=8, rate=0.1)
    model = sae.Standard(latents=24, penalty=0.1).build(8)
    with torch.no_grad():
        model.encoder_bias[:6] = -10.0
    training, _ = fit(model, data=data, training={"resampling": sae.Resampling((5,), 64, lambda: data.draw(64))})
    assert training.resampled == {5: 6}

    model.idle[:6] = 1000
    dead = model.idle >= 1000
    optimizer = training._optimizer
    before = {name: value.clone() for name, value in model.named_parameters()}
    moments = optimizer.state[model.encoder]["exp_avg"].clone()
    inputs = data.draw(200, torch.Generator().manual_seed(1))
    sae.resample(model, inputs, dead, optimizer, torch.Generator().manual_seed(2))
    alive = before["encoder"][~dead].norm(dim=1).mean()
    assert torch.allclose(model.encoder[dead].norm(dim=1), 0.2 * alive.expand(6), rtol=1e-5)
    units = torch.nn.functional.normalize(inputs, dim=1)
    for row, encoder in zip(model.decoder[dead], model.encoder[dead], strict=True):
        assert (units @ row).max() > 1 - 1e-6
        assert torch.allclose(encoder, 0.2 * alive * row, atol=1e-6)
    assert not model.encoder_bias[dead].any()
    for parameter in (model.encoder, model.decoder, model.encoder_bias):
        for name in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[parameter][name][dead].any()
            assert optimizer.state[parameter][name][~dead].any()
    assert torch.equal(optimizer.state[model.encoder]["exp_avg"][~dead], moments[~dead])
    for name, value in model.named_parameters():
        if name != "decoder_bias":
            assert torch.equal(value[~dead], before[name][~dead])


def test_inputs_are_drawn_by_the_square_of_their_loss():
    model = sae.Standard(latents=2, penalty=0.0).build(2)
    with torch.no_grad():
        model.encoder_bias[:] = -10.0  # the reconstruction is 0, the loss ||x||^2
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0**0.5]])  # losses 1 and 2: chances 1/5 and 4/5
    dead = torch.tensor([True, False])
    second = 0
    for seed in range(500):
        sae.resample(model, inputs, dead, generator=torch.Generator().manual_seed(seed))
        second += bool(model.decoder[0, 1] > 0.5)
        with torch.no_grad():
            model.encoder_bias[:] = -10.0
    assert abs(second / 500 - 0.8) < 0.09  # five standard errors


def test_impossible_resampling_is_refused():
    model = sae.Standard(latents=4, penalty=0.0).build(2)
    dead = torch.tensor([True, True, False, False])
    with pytest.raises(ValueError, match="2 latents are dead, but only 1 inputs"):
        sae.resample(model, torch.tensor([[-1.0, 5.0]]) * 100, dead)
    with pytest.raises(ValueError, match="every latent is dead"):
        sae.resample(model, torch.randn(9, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="steps is 0"):
        sae.Training(model, 0)
    training = sae.Training(model, 5, resampling=sae.Resampling((1,), 1, lambda: torch.randn(9, 2)))
    with pytest.raises(ValueError, match=r"pass Settings\(optimizer=training.optimizer\)"):
        training.after_step(1)


@pytest.mark.parametrize("annealing", [None, sae.Annealing(start=0.2, updates=4, queue=2)], ids=["plain", "annealed"])
def test_a_run_resumes_bit_for_bit(tmp_path, annealing):
    spec = sae.Standard(latents=24, penalty=0.1, annealing=annealing)
    data = sae.Planted(features=24, dim=8, rate=0.1)

    def run(folder, stop=None):
        torch.manual_seed(0)
        model = spec.build(8)
        training = sae.Training(model, 20)
        settings = train.Settings(steps=20, lr=1e-2, seed=0, save_every=7, **QUIET)

        def after(step):
            training.after_step(step)
            return step == stop

        train.fit(
            model, training.loss, lambda epoch: data.batches(64, 20), settings, run_dir=tmp_path / folder, on_step=after
        )
        return model

    whole = run("whole")
    run("broken", stop=9)
    resumed = run("broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    if annealing is not None:
        assert whole.annealed.power == pytest.approx(0.2)


def test_batches_of_another_size_stop_the_run_with_a_clear_error():
    model = sae.Standard(latents=4, penalty=0.0).build(5)
    with pytest.raises(
        ValueError, match=r"reads activations of size 5, got shape \(64, 8\): they come from another model"
    ):
        fit(model)
