"""GGUF files: what is written reads back, what is damaged or hostile is named and refused."""

import mmap
import random
import struct
import time
import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from paperworks.checkpoints.gguf import metadata as gguf_metadata
from paperworks.checkpoints.gguf import reader as gguf
from paperworks.compress.ggml.blocks import WRITABLE, decode, encode
from paperworks.core.errors import CorruptFile

# k-quants, whose rows are multiples of 256, have tests of their own: compress/test_kquants.py
SHORT_BLOCKS = [name for name in WRITABLE if not name.endswith("_K")]

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["<s>", "Ġa", "é", ""],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0, -3.0],
    "negative": -7,
    "wide": 1 << 40,
}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def tensor_entry(name="w", dims=(32,), type_id=0, offset=0, count=None) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(dims) if count is None else count)
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", type_id, offset)
    )


def padded(head: bytes, data: bytes = b"", alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def small(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "small.gguf"
    tensors = [
        (f"blk.{index}.{type}", torch.randn(3, 64, generator=generator), type)
        for index, type in enumerate(SHORT_BLOCKS)
    ]
    gguf.write(path, METADATA, [*tensors, ("norm", torch.ones(5), "Q4_0")])
    return path, tensors


def test_metadata_reads_back_with_its_types(small):
    file = gguf.read(small[0])
    assert file.version == 3
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert isinstance(file.metadata["tokenizer.ggml.add_bos_token"], bool)


def test_tensors_read_back_as_the_codec_stores_them(small):
    path, tensors = small
    file = gguf.read(path)
    assert list(file.tensors) == [name for name, _, _ in tensors] + ["norm"]
    for name, tensor, type in tensors:
        assert file.tensors[name].type == type
        assert file.tensors[name].shape == (3, 64)
        assert torch.equal(file.tensors[name].raw(), encode(tensor, type))
        assert torch.equal(file.tensors[name].load(), decode(encode(tensor, type), type))
        assert torch.equal(file.tensors[name].load(torch.bfloat16), decode(encode(tensor, type), type).bfloat16())


def test_vectors_stay_in_single_precision_whatever_type_is_asked(small):
    assert gguf.read(small[0]).tensors["norm"].type == "F32"


def test_writing_into_a_mapped_tensor_never_reaches_the_file(small):
    path, tensors = small
    before = path.read_bytes()
    gguf.read(path).tensors[tensors[0][0]].raw().zero_()
    assert path.read_bytes() == before


def test_a_tensor_outlives_the_file_object_and_its_name(small):
    path, tensors = small
    raw = gguf.read(path).tensors[tensors[0][0]].raw()
    path.unlink()
    assert torch.equal(raw, encode(tensors[0][1], tensors[0][2]))


def test_a_numpy_value_fixes_the_stored_type(tmp_path):
    path = tmp_path / "typed.gguf"
    gguf.write(
        path,
        {"general.architecture": "x", "a": np.uint8(7), "b": np.float64(0.1), "c": np.array([1, 2], dtype=np.uint64)},
        [],
    )
    assert gguf.read(path).metadata == {"general.architecture": "x", "a": 7, "b": 0.1, "c": [1, 2]}


def test_writing_keeps_one_tensor_in_memory_at_a_time(tmp_path):
    produced = []

    def produce():
        for index in range(4):
            assert all(earlier() is None for earlier in produced[:-1])  # only the last may still be alive
            tensor = torch.full((2, 32), float(index))
            produced.append(weakref.ref(tensor))
            yield f"t{index}", tensor, "F16"
            del tensor

    gguf.write(tmp_path / "stream.gguf", METADATA, produce())
    assert [t.load()[0, 0].item() for t in gguf.read(tmp_path / "stream.gguf").tensors.values()] == [0, 1, 2, 3]


def test_a_failed_write_leaves_the_older_file_and_no_debris(small):
    path, _ = small
    before = path.read_bytes()

    def breaks():
        yield "a", torch.ones(2, 32), "Q8_0"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        gguf.write(path, METADATA, breaks())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_rows_that_are_not_whole_blocks_need_a_stated_fallback(tmp_path):
    tensors = [("w", torch.ones(2, 33), "Q4_0")]
    with pytest.raises(ValueError, match="'w' has rows of 33 values, not a multiple of the 32 of Q4_0; pass fallback"):
        gguf.write(tmp_path / "a.gguf", METADATA, tensors)
    gguf.write(tmp_path / "b.gguf", METADATA, tensors, fallback="F16")
    assert gguf.read(tmp_path / "b.gguf").tensors["w"].type == "F16"


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, [], "needs 'general.architecture'"),
        (METADATA | {"general.alignment": 64}, [], "set by the writer"),
        (METADATA | {"x": None}, [], "cannot hold None"),
        (METADATA | {"x": [1, "a"]}, [], "mixes types"),
        (METADATA | {"x": []}, [], "empty"),
        (METADATA | {"x": 1 << 70}, [], "cannot hold"),
        (METADATA, [("a", torch.ones(2), "F32"), ("a", torch.ones(2), "F32")], "given twice"),
        (METADATA, [("a", torch.ones(2, 256), "IQ4_XS")], "can be read but not written"),
        (METADATA, [("a", torch.ones(2, 32).int(), "F32")], "must be floating"),
        (METADATA, [("a", torch.ones(0, 32), "F32")], "not empty"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(tmp_path, metadata, tensors, message):
    with pytest.raises(ValueError, match=message):
        gguf.write(tmp_path / "bad.gguf", metadata, tensors)
    assert list(tmp_path.iterdir()) == []


HOSTILE = {
    "empty": (b"", "24"),
    "wrong magic": (padded(header(magic=b"GGML")), "begins with b'GGML'"),
    "version 1": (padded(header(version=1)), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "10^12 tensors": (padded(header(tensors=10**12)), "1,000,000,000,000 tensors"),
    "2^63 keys": (padded(header(keys=1 << 63)), "keys"),
    "string of 2^63 bytes": (padded(header(keys=1) + struct.pack("<Q", 1 << 63), bytes(64)), "claims"),
    "string past the end": (padded(header(keys=1) + struct.pack("<Q", 5000), bytes(64)), "needs 5,000 bytes"),
    "array of 2^62 strings": (
        padded(header(keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 62), bytes(64)),
        "elements",
    ),
    "array past the end": (
        padded(header(keys=1) + text("k") + struct.pack("<IIQ", 9, 4, 4000), bytes(64)),
        "4,000 x uint32",
    ),
    "arrays in arrays": (
        padded(header(keys=1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40),
        "nests arrays",
    ),
    "unknown value type": (padded(header(keys=1) + text("k") + struct.pack("<I", 77), bytes(64)), "value type 77"),
    "unknown element type": (
        padded(header(keys=1) + text("k") + struct.pack("<IIQ", 9, 99, 1), bytes(64)),
        "element type 99",
    ),
    "bool of 2": (padded(header(keys=1) + text("k") + struct.pack("<IB", 7, 2), bytes(64)), "neither 0 nor 1"),
    "bad UTF-8": (padded(header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe", bytes(64)), "not UTF-8"),
    "bad UTF-8 in an array": (
        padded(header(keys=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\xff", bytes(64)),
        "'k'\\[0\\] is not UTF-8",
    ),
    "key twice": (padded(header(keys=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2), "'k' is given twice"),
    "five dimensions": (padded(header(tensors=1) + tensor_entry(dims=(1,) * 5), bytes(64)), "5 dimensions"),
    "2^32 - 1 dimensions": (padded(header(tensors=1) + tensor_entry(count=2**32 - 1), bytes(64)), "dimensions"),
    "shape that overflows": (
        padded(header(tensors=1) + tensor_entry(dims=(1 << 40, 1 << 40)), bytes(64)),
        "impossible shape",
    ),
    "dimension of 0": (padded(header(tensors=1) + tensor_entry(dims=(0,)), bytes(64)), "impossible shape"),
    "unknown tensor type": (padded(header(tensors=1) + tensor_entry(type_id=4), bytes(128)), "unknown type 4"),
    "half a block": (padded(header(tensors=1) + tensor_entry(dims=(31,), type_id=2), bytes(64)), "rows of 31"),
    "tensor past the end": (padded(header(tensors=1) + tensor_entry(dims=(64,)), bytes(128)), "ends at byte"),
    "offset past the end": (padded(header(tensors=1) + tensor_entry(offset=1 << 62), bytes(128)), "ends at byte"),
    "misaligned offset": (padded(header(tensors=1) + tensor_entry(offset=8), bytes(256)), "multiple of the alignment"),
    "overlapping tensors": (
        padded(header(tensors=2) + tensor_entry("a", (16,)) + tensor_entry("b", (16,), offset=32), bytes(256)),
        "inside the tensor 'a'",
    ),
    "tensor twice": (
        padded(header(tensors=2) + tensor_entry("a", (8,)) + tensor_entry("a", (8,), offset=32), bytes(256)),
        "given twice",
    ),
    "alignment of 0": (
        padded(header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), bytes(64)),
        "power of two",
    ),
    "alignment that is a string": (
        padded(header(keys=1) + text("general.alignment") + struct.pack("<I", 8) + text("a"), bytes(64)),
        "power of two",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_what_is_wrong(tmp_path, case):
    raw, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFile, match=message) as caught:
            gguf.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # a file of bytes allocates less than a megabyte
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_long_file_of_small_claims_stops_at_the_element_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_metadata, "MOST_ELEMENTS", 1000)
    path = tmp_path / "many.gguf"
    path.write_bytes(header(keys=2) + b"".join(text(key) + struct.pack("<IIQ", 9, 0, 900) + bytes(900) for key in "ab"))
    with pytest.raises(CorruptFile, match="past 1,000 elements"):
        gguf.read(path)


def test_version_2_and_an_alignment_of_its_own_are_read(tmp_path):
    head = header(tensors=1, keys=1, version=2) + text("general.alignment") + struct.pack("<II", 4, 4)
    head += tensor_entry(dims=(2,))
    path = tmp_path / "v2.gguf"
    path.write_bytes(padded(head, struct.pack("<2f", 1.5, -2.0), alignment=4))
    assert gguf.read(path).tensors["w"].load().tolist() == [1.5, -2.0]


def load_everything(path):
    file = gguf.read(path)
    for tensor in file.tensors.values():
        tensor.load()


def test_truncation_anywhere_is_noticed(small):
    path, _ = small
    whole = path.read_bytes()
    last = max(tensor._start + tensor.nbytes for tensor in gguf.read(path).tensors.values())
    target = path.with_name("cut.gguf")
    for length in [*range(0, 1200, 7), *range(1200, last, 97), last - 1]:
        target.write_bytes(whole[:length])
        with pytest.raises(CorruptFile):
            load_everything(target)


def test_flipped_header_bytes_load_or_are_refused_in_bounded_time_and_memory(small):
    path, _ = small
    whole = path.read_bytes()
    first = min(tensor._start for tensor in gguf.read(path).tensors.values())
    chance = random.Random(0)
    target = path.with_name("flipped.gguf")
    tracemalloc.start()
    begin = time.perf_counter()
    for _ in range(100):
        target.write_bytes(whole)
        load_everything(target)
    usual = (time.perf_counter() - begin) / 100
    refused = 0
    begin = time.perf_counter()
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(first)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        target.write_bytes(damaged)
        try:
            load_everything(target)
        except CorruptFile:
            refused += 1
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 160 < refused < 800  # the test damages what matters, and not only that
    assert seconds < 10 * 800 * usual  # a whole file takes longer than one that is refused
    assert peak < 8 << 20


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "big.gguf"
    gguf.write(path, METADATA, [("w", torch.zeros(4, mmap.PAGESIZE), "F32")])
    file = gguf.read(path)
    with path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(CorruptFile, match="shorter since it was opened"):
        file.tensors["w"].load()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        gguf.read(tmp_path / "absent.gguf")
