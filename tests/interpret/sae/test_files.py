"""SAELens' layout: what is written, what is read, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from paperworks.core.errors import CorruptFile
from paperworks.interpret import sae

SPECS = {
    "standard": sae.Standard(latents=9, penalty=3.0),
    "weighted": sae.Standard(latents=9, penalty=5.0, decoder="weighted"),
    "topk": sae.TopK(latents=9, k=2),
    "gated": sae.Gated(latents=9, penalty=4.0),
    "jumprelu": sae.JumpReLU(latents=9, penalty=0.1, threshold=0.2),
}


def made(kind):
    torch.manual_seed(0)
    model = SPECS[kind].build(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def their_forward(folder, x):
    """An independent reading of the layout, from its published description: x -> reconstruction."""
    w, cfg = load_file(folder / "sae_weights.safetensors"), json.loads((folder / "cfg.json").read_text())
    centred = x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x
    kind = cfg["architecture"]
    if kind == "gated":
        gate = centred @ w["W_enc"] + w["b_gate"] > 0
        f = gate * torch.relu(centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    else:
        pre = centred @ w["W_enc"] + w["b_enc"]
        if kind == "topk":
            values, indices = pre.topk(cfg["k"], dim=-1)
            f = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        else:
            f = torch.relu(pre) * (pre > w["threshold"]) if kind == "jumprelu" else torch.relu(pre)
    return f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parity
@pytest.mark.parametrize("kind", SPECS)
def test_what_is_written_computes_the_same_there_and_back(kind, tmp_path):
    model, x = made(kind), torch.randn(50, 4)
    sae.save(model, tmp_path / "a", tap="blocks.3", of="llama")
    assert torch.allclose(their_forward(tmp_path / "a", x), model(x), atol=1e-6)
    back = sae.load(tmp_path / "a")
    assert back.spec == model.spec
    assert torch.allclose(back(x), model(x), atol=1e-6)
    assert not back.training
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"]) == (4, 9)
    assert config["metadata"]["hook_name"] == "blocks.3"
    assert config["metadata"]["sae_lens_version"] >= "6"


def theirs(folder, kind, **changes):
    """A folder as SAELens 6 writes it, without any note of ours."""
    torch.manual_seed(1)
    shapes = {"W_enc": (4, 9), "W_dec": (9, 4), "b_dec": (4,)}
    per_latent = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(kind, ("b_enc",))
    tensors = {name: torch.randn(shape) for name, shape in (shapes | dict.fromkeys(per_latent, (9,))).items()}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)  # some are exactly 0
    config = {
        "d_in": 4,
        "d_sae": 9,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "hook_name": "blocks.0.hook_resid_pre"},
        "architecture": kind,
    } | ({"k": 2} if kind == "topk" else {})
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "gated", "jumprelu"])
def test_foreign_files_are_read(kind, centred, tmp_path):
    if not centred and kind in ("topk", "gated"):
        with pytest.raises(ValueError, match="without apply_b_dec_to_input"):
            sae.load(theirs(tmp_path / "a", kind, apply_b_dec_to_input=False))
        return
    folder, x = theirs(tmp_path / "a", kind, apply_b_dec_to_input=centred), torch.randn(50, 4)
    assert torch.allclose(sae.load(folder)(x), their_forward(folder, x), atol=1e-5)


def test_topk_of_versions_before_6_is_an_activation_function(tmp_path):
    folder = theirs(tmp_path / "a", "standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    model = sae.load(folder)
    assert model.spec == sae.TopK(latents=9, k=3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architecture": "matryoshka"}, ValueError, "unknown kind of autoencoder 'matryoshka'"),
        ({"normalize_activations": "layer_norm"}, ValueError, "normalize_activations is 'layer_norm'"),
        ({"activation_fn": "tanh-relu"}, ValueError, "activation_fn is 'tanh-relu'"),
        ({"rescale_acts_by_decoder_norm": True}, ValueError, "rescale_acts_by_decoder_norm"),
        ({"d_in": "4"}, CorruptFile, "gives d_in as '4'"),
        ({"d_sae": 0}, CorruptFile, "gives d_sae as 0"),
        ({"d_in": 10**9, "d_sae": 10**9}, CorruptFile, "no autoencoder is that large"),
        ({"d_in": 5}, CorruptFile, r"W_enc has shape \[4, 9\], cfg.json asks for \[5, 9\]"),
        ({"architecture": "topk", "k": 10}, CorruptFile, "gives k as 10; a whole number from 1 to 9"),
        ({"architecture": "gated"}, CorruptFile, "it lacks b_gate, b_mag, r_mag and has besides b_enc"),
        ({"metadata": {"paperworks": {"type": "Standard", "latents": 9}}}, CorruptFile, "spec that cannot be read"),
        ({"metadata": {"paperworks": {"type": "RMSNorm"}}}, CorruptFile, "spec that cannot be read"),
        (
            {"metadata": {"paperworks": {"type": "Standard", "latents": 8, "penalty": 1.0}}},
            CorruptFile,
            "d_sae 9, but a spec with 8 latents",
        ),
    ],
)
def test_contradictory_files_are_refused(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        sae.load(theirs(tmp_path / "a", "standard", **change))


def test_damaged_files_are_refused(tmp_path):
    folder = theirs(tmp_path / "a", "standard")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for bad in (whole[:-9], whole[:20], b"", b"\xff" * 64):
        weights.write_bytes(bad)
        with pytest.raises(CorruptFile, match="is not a whole safetensors file"):
            sae.load(folder)
    weights.write_bytes(whole)
    for bad in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (folder / "cfg.json").write_bytes(bad)
        with pytest.raises(CorruptFile, match=r"is not valid JSON|should hold a JSON object"):
            sae.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no sae_weights.safetensors"):
        sae.load(folder)
    (folder / "cfg.json").unlink()
    (folder / "sae_weights.pt").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match=r"holds no cfg.json"):
        sae.load(folder)


def test_weights_that_are_not_numbers_are_refused_in_both_directions(tmp_path):
    model = made("standard")
    with torch.no_grad():
        model.decoder[0, 0] = torch.nan
    with pytest.raises(ValueError, match="W_dec holds NaN"):
        sae.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    folder = theirs(tmp_path / "b", "standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": torch.full((4,), torch.inf)}, folder / "sae_weights.safetensors")
    with pytest.raises(CorruptFile, match="b_dec holds NaN or infinity"):
        sae.load(folder)
    save_file(tensors | {"b_dec": torch.zeros(4, dtype=torch.int32)}, folder / "sae_weights.safetensors")
    with pytest.raises(CorruptFile, match=r"b_dec is torch\.int32"):
        sae.load(folder)


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("of somebody's")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt already"):
        sae.save(made("standard"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
