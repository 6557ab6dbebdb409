"""Compressing models: all or nothing, resumable, with an honest account."""

import json
import warnings

import pytest
import torch
from torch import nn

import paperworks as pw
from paperworks import compress
from paperworks.checkpoints import from_transformers
from paperworks.compress import files
from paperworks.compress.account import coverage
from paperworks.core.coverage import CoverageWarning
from paperworks.core.errors import CorruptFile
from tests.parity.families import oracle

BATCHES = [torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
LEARNED = compress.GPTQ(bits=4, group=8)


def llama():
    return from_transformers(oracle("llama2"))


def logits(model):
    with torch.no_grad():
        return model(BATCHES[0])


def test_a_format_that_learns_needs_calibration():
    with pytest.raises(ValueError, match=r"GPTQ learns from data \(second_moment.*calibration="):
        compress.apply(llama(), LEARNED)


def test_the_report_counts_bytes_and_errors_and_scores():
    model, original = llama(), llama()
    compress.apply(model, LEARNED, calibration=BATCHES)
    report = compress.report(model, original=original, score=lambda m: float(logits(m).abs().mean()))
    for layer in report.layers:
        module = model.get_submodule(layer.path)
        assert layer.bytes == sum(x.nbytes for x in module.stored.values())
        rows, columns = module.shape
        assert layer.bits_per_weight == pytest.approx(LEARNED.bits_per_weight((rows, columns)))
        dense = original.get_submodule(layer.path).weight.detach()
        difference = dense - module.decoded_weight()
        assert layer.error.weight == pytest.approx(float(difference.norm() / dense.norm()), rel=1e-5)
        assert 0 < layer.error.output < 0.3
    assert report.before == float(logits(original).abs().mean()) != report.after
    text = str(report)
    assert "bits/weight" in text
    assert "before" in text
    assert "%" in text


def test_the_output_error_is_that_of_the_layers_outputs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16, bias=False)), torch.randn(50, 32)
    dense = model[0].weight.clone()
    compress.apply(model, compress.FP4(), "*", calibration=[x])
    lost = ((model(x) - x @ dense.T).norm() / (x @ dense.T).norm()).detach()
    assert compress.report(model).layers[0].error.output == pytest.approx(float(lost), rel=1e-4)


def test_a_failure_leaves_the_model_as_it_was():
    model = llama()
    before = logits(model)
    with torch.no_grad():
        model.blocks[2].feedforward.down.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.2\.feedforward\.down.*NaN"):
        compress.apply(model, LEARNED, calibration=BATCHES)
    assert not any(isinstance(module, compress.CompressedLinear) for module in model.modules())
    with torch.no_grad():
        model.blocks[2].feedforward.down.weight[0, 0] = 0
    assert logits(model).shape == before.shape


def test_wrong_arguments_are_named_and_names_are_formats():
    with pytest.raises(ValueError, match=r"pass a weight format, not the class: compress\.NF4\(\)"):
        compress.apply(llama(), compress.NF4)
    with pytest.raises(ValueError, match="the model comes first: expected a torch"):
        compress.apply(compress.NF4(), llama())
    with pytest.raises(ValueError, match=r"the second argument is the format.*got 4"):
        compress.apply(llama(), 4)
    with pytest.raises(ValueError, match="unknown weight format 'nf5'; did you mean 'nf4'"):
        compress.apply(llama(), "nf5")
    named, given = compress.apply(llama(), "int8"), compress.apply(llama(), compress.Int8())
    assert torch.equal(logits(named), logits(given))


def test_all_linear_says_which_matrices_it_leaves_out():
    model = oracle("mixtral")
    with pytest.warns(CoverageWarning, match=r"leaves out \d+% in stacked experts \(model"):
        compress.apply(model, compress.Int8(), "all-linear")
    found = coverage(model)
    assert found.weights == sum(p.numel() for p in oracle("mixtral").parameters())
    assert found.reached == 3 * (2 * 32 * 32 + 2 * 16 * 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        compress.apply(from_transformers(oracle("mixtral")), compress.Int8(), "all-linear")  # ours reach their experts


class Stop(BaseException):
    pass


@pytest.mark.parametrize("calibration", [None, BATCHES], ids=["plain", "calibrated"])
def test_an_interrupted_compression_goes_on_where_it_stopped(tmp_path, calibration):
    format = compress.NF4(block=16) if calibration is None else LEARNED
    whole = compress.apply(llama(), format, calibration=calibration)
    model, encoded = llama(), []

    def stop_in_the_second_block(path, done, total):
        if path.startswith("blocks.1.") and done > 9:
            raise Stop

    with pytest.raises(Stop):
        compress.apply(model, format, calibration=calibration, resume=tmp_path / "r", progress=stop_in_the_second_block)
    assert not any(isinstance(module, compress.CompressedLinear) for module in model.modules())

    original = type(format).encode

    def counted(self, weight, statistics=None):
        encoded.append(weight.shape)
        return original(self, weight, statistics)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(type(format), "encode", counted)
    try:
        compress.apply(model, format, calibration=calibration, resume=tmp_path / "r")
    finally:
        monkey.undo()
    total = len(compress.report(whole).layers)
    assert 0 < len(encoded) < total - 7  # the first block at least was not done again
    assert torch.equal(logits(model), logits(whole))
    assert not (tmp_path / "r").exists()


def test_a_finished_block_that_was_lost_is_done_again_and_the_others_are_kept(tmp_path):
    def stop(path, done, total):
        if path.startswith("blocks.2."):
            raise Stop

    with pytest.raises(Stop):
        compress.apply(llama(), LEARNED, calibration=BATCHES, resume=tmp_path / "r", progress=stop)
    kept = sorted((tmp_path / "r").glob("*.safetensors"))
    kept[0].write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match=r"delete it, and its block is compressed again"):
        compress.apply(llama(), LEARNED, calibration=BATCHES, resume=tmp_path / "r")
    kept[0].unlink()
    model = compress.apply(llama(), LEARNED, calibration=BATCHES, resume=tmp_path / "r")
    assert torch.equal(logits(model), logits(compress.apply(llama(), LEARNED, calibration=BATCHES)))


def test_another_compressions_folder_is_refused(tmp_path):
    def stop(path, done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        compress.apply(llama(), compress.NF4(block=16), resume=tmp_path / "r", progress=stop)
    with pytest.raises(ValueError, match=r"another compression .*different: format"):
        compress.apply(llama(), compress.NF4(block=32), resume=tmp_path / "r")
    changed = llama()
    nn.init.ones_(changed.blocks[0].mixer.query.weight)
    with pytest.raises(ValueError, match="different: weights"):
        compress.apply(changed, compress.NF4(block=16), resume=tmp_path / "r")
    (tmp_path / "r" / "plan.json").write_text("{")
    with pytest.raises(CorruptFile, match="delete the folder"):
        compress.apply(llama(), compress.NF4(block=16), resume=tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        compress.apply(llama(), compress.NF4(block=16), resume=tmp_path / "other")


def test_compressed_models_round_trip_bit_for_bit_in_our_layout(tmp_path):
    model = compress.apply(llama(), LEARNED, calibration=BATCHES)
    compress.apply(model, compress.GGML(kind="Q8_0"), "unembedding")
    pw.save(model, tmp_path / "m")
    loaded = pw.load(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    before, after = compress.report(model), compress.report(loaded)
    assert [x.path for x in before.layers] == [x.path for x in after.layers]
    assert [x.error for x in before.layers] == [x.error for x in after.layers]
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size - before.model_bytes < 30_000  # the header: names and checksums
    half = pw.load(tmp_path / "m", dtype=torch.bfloat16)
    assert half.blocks[0].mixer.query.compute_dtype == torch.bfloat16
    assert half(BATCHES[0]).dtype == torch.bfloat16


def test_damaged_descriptions_of_compressed_layers_are_refused(tmp_path):
    pw.save(compress.apply(llama(), compress.NF4(block=16)), tmp_path / "m")
    header = json.loads((tmp_path / "m" / "spec.json").read_text())

    def refused(change, match):
        copy = json.loads(json.dumps(header))
        change(copy["compressed"])
        (tmp_path / "m" / "spec.json").write_text(json.dumps(copy))
        with pytest.raises(ValueError, match=match):
            pw.load(tmp_path / "m")

    path = "blocks.0.mixer.query"
    refused(lambda c: c[path].update(format={"type": "NF5"}), "NF5")
    refused(lambda c: c[path].update(dtype="load"), "does not describe the layer")
    refused(lambda c: c[path].update(shape=[3, 5]), "stored for 3 x 5, the model has")
    refused(lambda c: c[path]["stored"].update(codes=["uint8", [1]]), "described as")
    refused(lambda c: c[path]["stored"].update(more=["uint8", [1]]), "lacks the tensor")
    refused(lambda c: c.pop(path), "missing blocks.0.mixer.query.weight")


def test_compressed_layers_of_any_model_round_trip_in_one_file(tmp_path):
    model = oracle("gpt2")
    compress.apply(model, compress.FP4(block=16))
    files.save(model, tmp_path / "layers.safetensors")
    fresh = files.load(oracle("gpt2"), tmp_path / "layers.safetensors")
    assert torch.equal(fresh(BATCHES[0]).logits, model(BATCHES[0]).logits)
    with pytest.raises(ValueError, match="no such linear layer"):
        files.load(oracle("llama2"), tmp_path / "layers.safetensors")
    with pytest.raises(ValueError, match="no compressed layers"):
        files.save(oracle("gpt2"), tmp_path / "none.safetensors")
    (tmp_path / "layers.safetensors").write_bytes((tmp_path / "layers.safetensors").read_bytes()[:-9])
    with pytest.raises(CorruptFile, match="cannot be read"):
        files.load(oracle("gpt2"), tmp_path / "layers.safetensors")
