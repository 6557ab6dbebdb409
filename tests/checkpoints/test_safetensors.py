"""Safetensors in one file or many: round trips, damage, and indexes that lie."""

import json
import pickle
import random
import struct
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from paperworks.checkpoints.safetensors import INDEX, SINGLE, checksum, open_store, write_shards
from paperworks.core.errors import CorruptFile


def tensors(count=6):
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{index}.weight": torch.randn(8, 16, generator=generator) for index in range(count)}


@pytest.fixture
def sharded(tmp_path):
    write_shards(tmp_path, tensors().items(), max_bytes=1100)  # two of 512 bytes fit
    return tmp_path


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_read_back_and_carry_hugging_face_names(sharded):
    names = sorted(path.name for path in sharded.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert json.loads((sharded / INDEX).read_text())["metadata"]["total_size"] == 6 * 512
    store = open_store(sharded)
    assert store.keys() == list(tensors())
    for name, tensor in tensors().items():
        assert store.shape(name) == (8, 16)
        assert store.dtype(name) == torch.float32
        assert torch.equal(store.load(name), tensor)


def test_one_shard_is_one_file_that_the_safetensors_library_reads(tmp_path):
    write_shards(tmp_path, tensors().items())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    for name, tensor in load_file(tmp_path / SINGLE).items():
        assert torch.equal(tensor, tensors()[name])
    assert torch.equal(open_store(tmp_path / SINGLE)["blocks.0.weight"], tensors()["blocks.0.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_dtype_and_awkward_memory_round_trip(tmp_path, dtype):
    base = torch.arange(24).view(4, 6).to(dtype)
    given = {"t": base.T, "slice": base[1:3], "tied": base, "again": base, "scalar": base[0, 1], "empty": base[:0]}
    write_shards(tmp_path, given.items())
    store = open_store(tmp_path)
    for name, tensor in given.items():
        assert store.dtype(name) == dtype
        assert torch.equal(store.load(name), tensor)


def test_at_most_one_shard_is_held_while_writing(tmp_path):
    produced = []

    def produce():
        for index in range(6):
            assert sum(ref() is not None for ref in produced) <= 2
            tensor = torch.full((8, 16), float(index))
            produced.append(weakref.ref(tensor))
            yield f"t{index}", tensor
            del tensor

    write_shards(tmp_path, produce(), max_bytes=512)
    assert open_store(tmp_path)["t5"][0, 0] == 5


def test_a_single_flipped_bit_in_the_data_is_noticed(tmp_path):
    write_shards(tmp_path, tensors().items())
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    data = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[chance.randrange(data, len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        store = open_store(path)
        with pytest.raises(CorruptFile, match="its checksum differs"):
            [store.load(name) for name in store]
        [open_store(path, verify=False).load(name) for name in store]  # asked not to look, it does not


@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 100_000])
def test_every_single_bit_matters_to_the_checksum(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before = checksum(data)
    assert checksum(data.clone()) == before
    for place in {0, size // 2, size - 1}:
        for bit in range(8):
            flipped = data.clone()
            flipped[place] ^= 1 << bit
            assert checksum(flipped) != before


def test_the_checksum_notices_exchanged_pages_and_odd_addresses_do_not_change_it():
    data = torch.randint(0, 256, (8193,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert checksum(torch.cat([data[4096:8192], data[:4096], data[8192:]])) != checksum(data)
    assert checksum(data[1:]) == checksum(data[1:].clone())


def test_files_of_others_have_no_checksums_and_load(tmp_path):
    save_file(tensors(), tmp_path / SINGLE)
    assert torch.equal(open_store(tmp_path)["blocks.3.weight"], tensors()["blocks.3.weight"])


def test_truncation_anywhere_is_noticed(tmp_path):
    write_shards(tmp_path, tensors(2).items())
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match="not a whole safetensors file"):
            open_store(path)


def test_flipped_header_bytes_load_or_are_refused(tmp_path):
    write_shards(tmp_path, tensors(2).items())
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[chance.randrange(end)] = chance.choice([0, 0x22, 0x7B, 0xFF, chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            store = open_store(path)
            for name in store:
                store.load(name)
        except CorruptFile:
            refused += 1
    assert 250 < refused < 500


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"X99","shape":[2],"data_offsets":[0,8]}}',
        b"[]",
        b"not json",
    ],
)
def test_hostile_headers_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CorruptFile):
        open_store(path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 10**12])
def test_a_header_length_that_overflows_is_refused(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + bytes(64))
    with pytest.raises(CorruptFile):
        open_store(path)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd.safetensors", "C:\\x.safetensors", "a\\..\\..\\b.safetensors", INDEX, 7, ""],
)
def test_an_index_cannot_lead_outside_its_folder_or_to_another_index(sharded, file):
    edit_index(sharded, lambda index: index["weight_map"].update({"blocks.0.weight": file}))
    with pytest.raises(CorruptFile, match=r"a \.safetensors file beside it is expected"):
        open_store(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names the shard model-00002-of-00003"):
        open_store(sharded)


def test_a_wrong_total_is_refused_unless_verification_is_waived(sharded):
    edit_index(sharded, lambda index: index["metadata"].update(total_size=10**12))
    with pytest.raises(CorruptFile, match="states total_size 1000000000000, but its shards hold 3,072 bytes"):
        open_store(sharded)
    assert len(open_store(sharded, verify=False)) == 6


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file(load_file(second) | {"blocks.0.weight": torch.zeros(8, 16)}, second)
    with pytest.raises(CorruptFile, match=f"'blocks.0.weight' is in two shards, {first.name} and {second.name}"):
        open_store(sharded)


def test_an_index_and_shards_that_disagree_are_refused(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(CorruptFile, match=r"'ghost' to model-00001-of-00003\.safetensors, but it is in none"):
        open_store(sharded)
    edit_index(sharded, lambda index: [index["weight_map"].pop(name) for name in ("ghost", "blocks.5.weight")])
    with pytest.raises(CorruptFile, match=r"does not list tensors that its shards hold: blocks\.5\.weight"):
        open_store(sharded)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\ud800"])
def test_an_unreadable_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CorruptFile, match=r"index\.json"):
        open_store(tmp_path)


def test_an_index_that_gives_a_tensor_twice_is_refused(sharded):
    text = (sharded / INDEX).read_text().replace('"blocks.1.weight"', '"blocks.0.weight"')
    (sharded / INDEX).write_text(text)
    with pytest.raises(CorruptFile, match=r"gives 'blocks\.0\.weight' twice"):
        open_store(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model.ckpt", "a.pth"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="weights_only=True"):
            open_store(path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_weights_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no weights: model\.safetensors or"):
        open_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_store(tmp_path / "x.safetensors")


def test_an_unknown_tensor_suggests_the_nearest(sharded):
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.weight'"):
        open_store(sharded).load("block.0.weight")


def test_nothing_to_write_or_a_name_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tensors"):
        write_shards(tmp_path, [])
    with pytest.raises(ValueError, match="given twice"):
        write_shards(tmp_path, [("a", torch.ones(1)), ("a", torch.ones(1))])
