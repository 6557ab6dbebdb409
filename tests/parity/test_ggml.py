"""Byte for byte and bit for bit against the gguf package, an independent implementation of the same formats."""

import numpy as np
import pytest
import torch

from paperworks.checkpoints.gguf import reader as ours
from paperworks.compress.ggml.blocks import BLOCKS, WRITABLE, decode, encode
from paperworks.core.errors import AssetUnavailable
from paperworks.data.assets import assets

# k-quants, whose rows are multiples of 256, have tests of their own: compress/test_kquants.py
SHORT_BLOCKS = [name for name in WRITABLE if not name.endswith("_K")]

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.parity

OURS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
THEIRS = ["IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M"]
THEIRS += ["TQ1_0", "TQ2_0", "MXFP4", "NVFP4"]


def available(name):
    return name in gguf.GGMLQuantizationType.__members__


@pytest.mark.parametrize("type", BLOCKS)
def test_type_numbers_and_sizes_agree(type):
    if not available(type):
        pytest.skip(f"this gguf package does not know {type}")
    their = gguf.GGMLQuantizationType[type]
    assert their.value == BLOCKS[type].type_id
    assert gguf.GGML_QUANT_SIZES[their] == (BLOCKS[type].values, BLOCKS[type].bytes)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("type", OURS + THEIRS)
def test_random_bytes_decode_to_the_same_bits(type):
    if not available(type):
        pytest.skip(f"this gguf package does not know {type}")
    raw = np.random.default_rng(0).integers(0, 256, (16, 40 * BLOCKS[type].bytes), dtype=np.uint8)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type])
    ours = decode(torch.from_numpy(raw), type).numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)  # equal values, NaN at the same places; no tolerance


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("type", SHORT_BLOCKS)
@pytest.mark.parametrize("kind", ["normal", "uniform", "integers", "with zero blocks", "tiny"])
def test_writing_gives_the_same_bytes(type, kind):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(64, 1024)).astype(np.float32)
    if kind == "uniform":
        x = rng.uniform(-3, 3, x.shape).astype(np.float32)
    elif kind == "integers":  # many ties between extremes and many halves to round
        x = rng.integers(-8, 9, x.shape).astype(np.float32) / 2
    elif kind == "with zero blocks":
        x[:, 32:96] = 0
    elif kind == "tiny":
        x *= np.float32(1e-6)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type]).view(np.uint8)
    np.testing.assert_array_equal(encode(torch.from_numpy(x), type).numpy(), theirs.reshape(64, -1))


def test_bfloat16_keeps_every_nan_a_nan_like_the_reference():
    bits = np.random.default_rng(3).integers(0, 2**32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits, np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF])]).view(np.float32)
    theirs = gguf.quants.quantize(x[None], gguf.GGMLQuantizationType.BF16).view(np.uint8)
    np.testing.assert_array_equal(encode(torch.from_numpy(x)[None], "BF16").numpy(), theirs)


def assert_same_file(path):
    """Both readers see the same metadata and the same bytes under the same names."""
    mine, theirs = ours.read(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(mine.metadata) == list(fields)
    for name, field in fields.items():
        value = mine.metadata[name]
        if isinstance(value, list) and len(value) > 1000:  # the package takes seconds to convert a vocabulary
            assert len(value) == len(field.data)
            assert value[::97] == field.contents(slice(None, None, 97)), name
        else:
            assert value == field.contents(), name
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = mine.tensors[tensor.name]
        assert found.type == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(found.raw().numpy().ravel(), tensor.data.view(np.uint8).ravel())
    return mine, theirs


def test_a_file_written_here_is_read_alike_by_the_package(tmp_path):
    generator = torch.Generator().manual_seed(0)
    metadata = {
        "general.architecture": "llama",
        "general.name": "ü",
        "llama.block_count": 2,
        "some.flag": True,
        "some.list": [1, -2, 3],
        "some.words": ["a", "", "é"],
        "some.rate": 0.5,
        "some.big": 1 << 40,
    }
    tensors = [
        (f"blk.{i}.{type}", torch.randn(3, 5, 64, generator=generator), type) for i, type in enumerate(SHORT_BLOCKS)
    ]
    ours.write(tmp_path / "x.gguf", metadata, [*tensors, ("norm", torch.randn(7), "F16")])
    mine, _ = assert_same_file(tmp_path / "x.gguf")
    assert mine.metadata == metadata


@pytest.mark.asset
def test_smollm2_is_read_alike_and_decoded_to_the_same_bits():
    try:
        path = assets.fetch("smollm2")
    except AssetUnavailable as error:
        pytest.skip(str(error))
    mine, theirs = assert_same_file(path)
    assert sum(tensor.type == "Q4_1" for tensor in mine.tensors.values()) == 210
    assert sum(int(np.prod(tensor.shape)) for tensor in mine.tensors.values()) == 134_515_008
    for tensor in theirs.tensors[:12]:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            mine.tensors[tensor.name].load().numpy(), expected.reshape(mine.tensors[tensor.name].shape)
        )
