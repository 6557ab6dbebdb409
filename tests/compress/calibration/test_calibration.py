"""Batches run block by block, later layers see the compressed earlier ones, and memory and models are left clean."""

import pytest
import torch
from torch import nn

from paperworks import compress
from paperworks.checkpoints import from_transformers
from paperworks.compress.calibration.calibration import Calibration, stages
from paperworks.compress.calibration.statistics import Gatherer, Statistics
from paperworks.core.linear import weight_of
from paperworks.core.selection import select_linears
from tests.parity.families import oracle

BATCHES = [torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
MODELS = {
    "llama": lambda: from_transformers(oracle("llama2")),
    "gpt2": lambda: from_transformers(oracle("gpt2")),
    "transformers' llama": lambda: oracle("llama2"),
    "transformers' gpt2": lambda: oracle("gpt2"),
    "transformers' gemma2": lambda: oracle("gemma2"),
}


def inputs_of(model, path):
    """All inputs that a layer sees when the whole model is run."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    hook.remove()
    return torch.cat(seen)


def halved(model, path):
    """Change a layer, as compression does."""
    with torch.no_grad():
        weight_of(model.get_submodule(path)).mul_(0.5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequential", [True, False])
def test_statistics_are_those_of_the_whole_model_with_everything_before_compressed(name, sequential):
    model, plain = MODELS[name](), MODELS[name]()
    paths = list(select_linears(model, "all-linear"))
    visited = []
    calibration = Calibration(BATCHES, sequential=sequential)
    for stage in stages(model, paths, calibration, ["second_moment", "absolute_max"]):
        for path in stage.paths:
            # within a block the first block's dense inputs serve if not sequential; the block's own input is compressed
            if sequential or stage.unit.endswith("0"):
                seen = inputs_of(model if sequential else plain, path).double()
                moment = stage.statistics.second_moment.double()
                assert torch.allclose(moment, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-6)  # float32 sums
                assert torch.allclose(stage.statistics.absolute_max.double(), seen.abs().amax(0), rtol=1e-5)
        for path in stage.paths:
            halved(model, path)
            visited.append(path)
    assert sorted(visited) == sorted(paths)
    assert visited == sorted(visited, key=visited.index)


def test_layers_that_read_one_input_share_a_stage():
    model = from_transformers(oracle("llama2"))
    found = [
        stage.paths
        for stage in stages(model, list(select_linears(model, "all-linear")), Calibration(BATCHES), ["absolute_max"])
    ]
    names = [{path.rsplit(".", 1)[1] for path in paths} for paths in found[:4]]
    assert names == [{"query", "key", "value"}, {"output"}, {"gate", "up"}, {"down"}]


def test_models_without_blocks_are_run_whole_for_every_stage():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(4, 6) for _ in range(2)]
    found = {}
    for stage in stages(model, ["0", "2"], Calibration(batches), ["second_moment"]):
        found[stage.paths[0]] = stage.statistics
        halved(model, stage.paths[0])
    hidden = torch.relu(torch.cat(batches) @ model[0].weight.T + model[0].bias)
    assert torch.allclose(found["2"].second_moment, hidden.T @ hidden / len(hidden), atol=1e-6)


def test_the_readout_comes_after_the_blocks_and_sees_what_they_became():
    model = oracle("llama2")
    paths = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    order = []
    for stage in stages(model, paths, Calibration(BATCHES), ["second_moment"]):
        seen = inputs_of(model, stage.paths[0])
        assert torch.allclose(stage.statistics.second_moment, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-6)
        halved(model, stage.paths[0])
        order += stage.paths
    assert order == [paths[2], paths[1], paths[0]]


def test_the_model_is_left_in_its_mode_without_hooks_also_after_a_failure():
    model = oracle("llama2").train()
    model.config.use_cache = True
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn.*NaN or infinite.*look for NaN"):
        for _ in stages(model, list(select_linears(model, "all-linear")), Calibration(BATCHES), ["absolute_max"]):
            pass
    assert model.training
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no batches"), (BATCHES[0], r"wrap it: \[batch\]"), ({"input_ids": BATCHES[0]}, "list of batches")],
)
def test_calibration_without_batches_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        Calibration(batches)


def test_a_layer_that_no_token_reaches_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"idle: .*never reach"):
        list(stages(Idle(), ["used", "idle"], Calibration([torch.randn(2, 4)]), ["absolute_max"]))
    with pytest.raises(ValueError, match="idle: no calibration token reached it"):
        list(stages(Idle(), ["used", "idle"], Calibration([torch.randn(2, 4)] * 2), ["absolute_max"]))


def test_out_of_memory_says_how_to_need_less(monkeypatch):
    def full(self, inputs):
        raise MemoryError("no memory")

    monkeypatch.setattr(Gatherer, "add", full)
    with pytest.raises(MemoryError, match="fewer or shorter batches"):
        list(stages(nn.Sequential(nn.Linear(4, 4)), ["0"], Calibration([torch.randn(2, 4)]), ["absolute_max"]))


def test_samples_are_a_uniform_choice_of_all_tokens_in_bounded_memory():
    gatherer = Gatherer(1, ["samples"], samples=500)
    for part in torch.arange(20_000.0).view(40, 500, 1):
        gatherer.add(part)
    samples = gatherer.statistics().samples.flatten()
    assert samples.shape == (500,)
    assert len(samples.unique()) == 500
    # 500 uniform draws: the mean's standard error is 20000 / sqrt(12 * 500) = 258
    assert abs(samples.mean() - 10_000) < 4 * 258


def test_statistics_of_batches_equal_those_of_all_inputs_at_once():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    gatherer = Gatherer(5, Statistics.names())
    for part in x.split([7, 33, 20]):
        gatherer.add(part.view(1, -1, 5))
    found, whole = gatherer.statistics(), Statistics.of(x)
    assert found.count == whole.count == 60
    for name in Statistics.names():
        assert torch.allclose(getattr(found, name), getattr(whole, name), atol=1e-6), name
    assert torch.allclose(whole.second_moment, x.T @ x / 60, atol=1e-6)
    assert torch.equal(whole.minimum, x.amin(0))
    assert torch.equal(whole.maximum, x.amax(0))


def test_tuning_sees_the_blocks_inputs_and_former_outputs():
    model = from_transformers(oracle("llama2"))
    calls = []

    def tune(block, inputs, outputs, run):
        assert torch.is_grad_enabled()
        pairs = enumerate(zip(inputs, outputs, strict=True))
        calls.append((block, [float((run(i, x) - y).norm() / y.norm()) for i, (x, y) in pairs]))

    compress.apply(model, compress.FP4(), calibration=Calibration(BATCHES, tune=tune))
    assert [block for block, _ in calls] == list(model.blocks)
    assert all(0 < error < 0.5 for _, errors in calls for error in errors)
