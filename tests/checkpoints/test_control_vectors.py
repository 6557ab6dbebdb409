"""Control vectors as files: what is written reads back bit for bit, and other files are refused."""

import gguf as package
import pytest
import torch

from paperworks.checkpoints.control_vectors import load_control_vector, save_control_vector
from paperworks.checkpoints.gguf import reader as gguf
from paperworks.core.errors import CorruptFile
from paperworks.interpret import ControlVector


def vector(*blocks, dim=48):
    generator = torch.Generator().manual_seed(0)
    return ControlVector({f"blocks.{block}": torch.randn(dim, generator=generator) for block in blocks})


def test_a_control_vector_survives_the_file_bit_for_bit(tmp_path):
    original = vector(1, 7, 20)
    original.directions["blocks.7"][:3] = torch.tensor([-0.0, 1e-42, 3e38])
    save_control_vector(original, tmp_path / "v.gguf")
    again = load_control_vector(tmp_path / "v.gguf")
    assert list(again.directions) == list(original.directions)
    for path, direction in original.directions.items():
        assert torch.equal(again.directions[path].view(torch.int32), direction.view(torch.int32))


def test_the_gguf_package_reads_the_fields_that_repeng_writes(tmp_path):
    original = vector(3, 4)
    save_control_vector(original, tmp_path / "v.gguf", model_hint="qwen2")
    reader = package.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen2"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.3", "direction.4"]
    assert (reader.tensors[1].data == original.directions["blocks.4"].numpy()).all()


def test_a_file_written_by_the_gguf_package_reads_alike(tmp_path):
    direction = vector(9).directions["blocks.9"].numpy()
    writer = package.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.9", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (load_control_vector(tmp_path / "v.gguf").directions["blocks.9"].numpy() == direction).all()


@pytest.mark.parametrize("path", ["blocks.0", "blocks.3.mixer", "norm", "blocks.03"])
def test_paths_a_file_cannot_name_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match=r"from 'blocks\.1' on, it cannot hold"):
        save_control_vector(ControlVector({path: torch.ones(4)}), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "direction", [torch.ones(2, 2), torch.ones(4, dtype=torch.float64), torch.tensor([1.0, float("nan")])]
)
def test_directions_that_are_not_finite_float32_vectors_are_refused(tmp_path, direction):
    with pytest.raises(ValueError, match=r"blocks\.1: a direction in a file is a finite float32 vector"):
        save_control_vector(ControlVector({"blocks.1": direction}), tmp_path / "v.gguf")


def test_an_empty_control_vector_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no direction to write"):
        save_control_vector(ControlVector({}), tmp_path / "v.gguf")


@pytest.mark.parametrize(
    ("architecture", "names", "sizes", "error", "message"),
    [
        ("llama", ["direction.1"], [4], ValueError, "holds a 'llama', not a control vector"),
        ("controlvector", ["direction.0"], [4], CorruptFile, "no direction of a control vector"),
        ("controlvector", ["weight"], [4], CorruptFile, "no direction of a control vector"),
        ("controlvector", [], [], CorruptFile, "holds no direction"),
        ("controlvector", ["direction.1", "direction.2"], [4, 5], CorruptFile, r"different sizes: \[4, 5\]"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, architecture, names, sizes, error, message):
    tensors = [(name, torch.ones(size), "F32") for name, size in zip(names, sizes, strict=True)]
    gguf.write(tmp_path / "v.gguf", {"general.architecture": architecture}, tensors)
    with pytest.raises(error, match=message):
        load_control_vector(tmp_path / "v.gguf")
