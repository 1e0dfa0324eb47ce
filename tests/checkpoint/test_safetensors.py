"""Files of the format: written by hand from its text, by its own library, and by this package."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.checkpoint import Checkpoint, header, save_safetensors, save_sharded
from tests.checkpoint.data import write as library

pytestmark = pytest.mark.any_version

LIBRARY = Path(library.__file__).with_name("library.safetensors")


def by_hand(path: Path, said: Any, data: bytes, length: int | None = None) -> Path:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


KNOWN = {  # type: bytes, and the two numbers that they are by the type's definition
    "BOOL": ("0100", [True, False]),
    "U8": ("ff01", [255, 1]),
    "I8": ("ff01", [-1, 1]),
    "F8_E4M3": ("b87e", [-1.0, 448.0]),
    "F8_E5M2": ("3cfb", [1.0, -57344.0]),
    "F8_E8M0": ("7f82", [1.0, 8.0]),
    "F8_E4M3FNUZ": ("40ff", [1.0, -240.0]),
    "F8_E5M2FNUZ": ("40ff", [1.0, -57344.0]),
    "I16": ("feff0001", [-2, 256]),
    "U16": ("feff0001", [65534, 256]),
    "F16": ("003c00c0", [1.0, -2.0]),
    "BF16": ("803f00c0", [1.0, -2.0]),
    "I32": ("feffffff00000100", [-2, 65536]),
    "U32": ("feffffff00000100", [4294967294, 65536]),
    "F32": ("0000803f000000c0", [1.0, -2.0]),
    "C64": ("0000803f000000c00000000000000040", [1 - 2j, 2j]),
    "F64": ("000000000000f03f00000000000000c0", [1.0, -2.0]),
    "I64": ("feffffffffffffff0000000001000000", [-2, 1 << 32]),
    "U64": ("feffffffffffffff0000000001000000", [(1 << 64) - 2, 1 << 32]),
}


@pytest.mark.parametrize("dtype", KNOWN)
def test_numbers_of_every_type_at_any_address(dtype: str, tmp_path: Path) -> None:
    data, numbers = bytes.fromhex(KNOWN[dtype][0]), KNOWN[dtype][1]
    said = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": dtype, "shape": [2, 1], "data_offsets": [3, 3 + len(data)]},
    }
    tensors = Checkpoint(by_hand(tmp_path / "x.safetensors", said, b"xyz" + data))
    assert tensors.dtype("b") == dtype
    assert tensors["b"].shape == (2, 1)
    assert [x.item() for x in tensors["b"].ravel()] == numbers
    kept = tensors["b"].copy()
    save_safetensors(tmp_path / "y.safetensors", tensors)
    assert Checkpoint(tmp_path / "y.safetensors")["b"].tobytes() == kept.tobytes() == data


def test_every_type_of_the_format_is_known() -> None:
    assert set(KNOWN) == set(header.DTYPES)
    assert set(library.TENSORS) | {"F6_E2M3", "F6_E3M2"} == set(header.DTYPES) | set(header.PACKED)


@pytest.mark.parametrize(("dtype", "shape", "stored"), [("F4", [2, 4], (2, 2)), ("F6_E2M3", [4], (3,))])
def test_packed_types_are_bytes(
    dtype: str, shape: list[int], stored: tuple[int, ...], tmp_path: Path
) -> None:
    data = bytes(range(0x21, 0x21 + int(np.prod(stored))))
    said = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    path = by_hand(tmp_path / "x.safetensors", said, data)
    array = Checkpoint(path)["w"]
    assert (array.dtype, array.shape, array.tobytes()) == (np.uint8, stored, data)
    save_safetensors(tmp_path / "y.safetensors", {"w": array}, dtypes={"w": dtype})
    again = Checkpoint(tmp_path / "y.safetensors")
    assert (again.dtype("w"), again["w"].tobytes()) == (dtype, data)


def test_float4_is_packed_the_first_number_in_the_lower_bits(tmp_path: Path) -> None:
    numbers = jnp.array([[1.0, -6.0, 0.5, 3.0]], jnp.float4_e2m1fn)
    save_safetensors(tmp_path / "x.safetensors", {"w": numbers})
    tensors = Checkpoint(tmp_path / "x.safetensors")
    assert (tensors.dtype("w"), tensors["w"].tolist()) == ("F4", [[0xF2, 0x51]])


@pytest.mark.parametrize("dtype", library.TENSORS)
def test_file_of_the_formats_library(dtype: str) -> None:
    tensors = Checkpoint(LIBRARY)
    array = tensors[f"a.{dtype}"]
    assert tensors.dtype(f"a.{dtype}") == dtype
    assert array.tobytes() == library.contents(dtype, library.SHAPE)
    assert list(array.shape) == (library.SHAPE if dtype != "F4" else [1, 1])


def test_file_of_the_formats_library_is_written_alike(tmp_path: Path) -> None:
    tensors = Checkpoint(LIBRARY)
    assert (tensors["scalar"].shape, tensors["scalar"].item()) == ((), 1.0)
    assert tensors["empty"].shape == (0, 4)
    assert tensors["größe"].tobytes() == b"abc"
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors, dtypes={"a.F4": "F4"}, metadata=tensors.metadata("scalar"))
    assert path.read_bytes() == LIBRARY.read_bytes()


def test_bytes_that_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(
        path, {"b": np.array([1], np.uint8), "a": np.array([2.0], ml_dtypes.bfloat16).reshape(())}
    )
    text = (
        b'{"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}'
    )
    text += b" " * (-len(text) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(text)) + text + b"\x00\x40\x01"
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_arrays_are_slices_of_the_mapped_file_and_outlive_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": np.arange(12, dtype=np.int32).reshape(3, 4), "t": np.ones((2, 3)).T})
    array = Checkpoint(path)["a"]
    assert not array.flags.writeable
    assert not array.flags.owndata
    save_safetensors(path, {"a": np.zeros(1)})
    assert array[1].tolist() == [4, 5, 6, 7]


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LONG = struct.unpack("<Q", b"PK\x03\x04abcd")[0]


@pytest.mark.parametrize(
    ("said", "size", "words"),
    [
        ({"w": W}, 4, r"'w' lies at bytes 0 to 8 .* file has 4: it is cut off"),
        ({"w": W}, 9, "1 bytes follow 'w'"),
        ({}, 3, "3 bytes follow the header"),
        ({"w": W, "v": W}, 8, "'v' begins at byte 0 and overlaps|'w' begins at byte 0 and overlaps"),
        ({"v": W, "w": W | {"data_offsets": [4, 12]}}, 12, "'w' begins at byte 4 and overlaps 'v'"),
        ({"v": W, "w": W | {"data_offsets": [9, 17]}}, 17, "'w' begins at byte 9 and leaves 1 bytes free"),
        ({"w": W | {"data_offsets": [8, 0]}}, 8, r"data_offsets \[8, 0\], need \[begin, end\]"),
        ({"w": W | {"data_offsets": [-8, 0]}}, 8, r"data_offsets \[-8, 0\]"),
        ({"w": W | {"data_offsets": [0, 1 << 70]}}, 8, "8 bytes, its data_offsets"),
        ({"w": W | {"shape": [3]}}, 8, r"F32 \[3\], 12 bytes, its data_offsets \[0, 8\] are 8 bytes"),
        ({"w": W | {"shape": [1 << 62, 1 << 62]}}, 8, "its data_offsets .* are 8 bytes"),
        ({"w": W | {"shape": [2.0]}}, 8, r"shape \[2.0\], need a list of sizes"),
        ({"w": W | {"shape": [True, 2]}}, 8, r"shape \[True, 2\]"),
        ({"w": W | {"shape": [-2]}}, 8, r"shape \[-2\]"),
        (
            {"w": W | {"dtype": "F8_E3M4"}},
            8,
            "dtype 'F8_E3M4', which this reader does not know. It knows BOOL",
        ),
        ({"w": W | {"dtype": ["F32"]}}, 8, "which this reader does not know"),
        (
            {"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}},
            2,
            "rows of 12 bits, need whole bytes",
        ),
        ({"w": {"dtype": "F32", "shape": [2]}}, 8, "described by .*need .*data_offsets"),
        ({"w": 3}, 8, "described by 3"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ is .* strings to strings"),
        (b'{"w":1,"w":2}', 0, "the key 'w' is there twice"),
        (b"[]", 0, "no JSON object in UTF-8: it does not begin with"),
        (b' {"w":1}', 0, "it does not begin with"),
        (b'{"w"', 0, "no JSON object"),
        (b'{"\xff":1}', 0, "no JSON object in UTF-8"),
        (b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "no JSON object|described by"),
    ],
)
def test_broken_files_are_refused_with_what_was_found(
    said: Any, size: int, words: str, tmp_path: Path
) -> None:
    path = by_hand(tmp_path / "x.safetensors", said, bytes(size))
    with pytest.raises(ValueError, match=words) as refused:
        Checkpoint(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 bytes, a safetensors file begins with 8"),
        (b"\1\0\0", "has 3 bytes"),
        (struct.pack("<Q", 50) + b"{}", "has 10 bytes, its header alone needs 58: it is cut off"),
        (struct.pack("<Q", 100_000_001) + b"{}", "a header of 100000001 bytes, more than"),
        (b"\xff" * 16, "this is no safetensors file"),
        (b"PK\3\4abcd{}", f"a header of {LONG} bytes"),
    ],
)
def test_no_header_is_believed(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        Checkpoint(path)


def test_a_file_cut_anywhere_or_with_a_byte_changed_never_yields_more_than_it_holds(tmp_path: Path) -> None:
    whole, path = LIBRARY.read_bytes(), tmp_path / "x.safetensors"
    for size in range(0, len(whole), 41):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut off"):
            Checkpoint(path)
    drawn = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[int(drawn.integers(len(whole)))] = int(drawn.integers(256))
        path.write_bytes(changed)
        try:
            tensors = Checkpoint(path)
        except ValueError:
            continue
        for name in tensors:
            assert tensors[name].nbytes <= len(whole)


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(5)} | {"big": np.arange(32.0)}
    save_sharded(tmp_path / "m", tensors, shard_bytes=40)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 16 + 256}
    files = set(index["weight_map"].values())
    assert files == {file.name for file in (tmp_path / "m").glob("*.safetensors")}
    assert len(files) == 4
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors.index.json"):
        read = Checkpoint(path)
        assert set(read) == set(tensors)
        assert (len(read), "t0" in read, "no" in read) == (6, True, False)
        assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_an_index_by_hand_opens_only_files_that_are_asked_for(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.safetensors", {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\7")
    (tmp_path / "b.safetensors").write_bytes(b"no file of the format")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}})
    )
    tensors = Checkpoint(tmp_path)
    assert tensors["x"].tolist() == [7]
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        tensors["y"]
    with pytest.raises(ValueError, match=r"a\.safetensors holds 'z', which it does not"):
        tensors["z"]
    with pytest.raises(KeyError, match=r"no tensor 'model\.x'"):
        tensors["model.x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no index of a checkpoint"),
        ("{}", "need .*weight_map"),
        ("[]", "is no index"),
        ('{"weight_map": {"x": "../a.safetensors"}}', "names the file '../a.safetensors', need the name"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "need the name of a file beside it"),
        ('{"weight_map": {"x": 3}}', "names the file 3"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "is not beside it. Download it"),
    ],
)
def test_broken_indices(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Checkpoint(tmp_path)


def test_a_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found neither; need one"):
        Checkpoint(tmp_path)
    for name in "ab":
        save_safetensors(tmp_path / f"{name}.safetensors", {"x": np.ones(1)})
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors; need one"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        ({"x": np.array(["a"])}, {}, "'x' is <U1, which the format does not know"),
        ({"x": np.ones(2, ml_dtypes.float6_e2m3fn)}, {}, "Pack it and give its type: dtypes="),
        ({"x": np.ones(3, ml_dtypes.float4_e2m1fn)}, {}, "need rows of pairs"),
        ({"x": SimpleNamespace(is_fully_addressable=False)}, {}, "devices of other processes. Gather it"),
        ({"__metadata__": np.ones(3)}, {}, "give the tensor another name"),
        ({"x": np.ones(3)}, {"metadata": {"a": 1}}, "need a map of strings"),
        ({"x": np.ones(3)}, {"dtypes": {"y": "F4"}}, r"dtypes names \['y'\]"),
        ({"x": np.ones(3)}, {"dtypes": {"x": "F4"}}, "Need an array of bytes"),
        ({"x": np.ones(2, np.uint8)}, {"dtypes": {"x": "F6_E2M3"}}, "Need an array of bytes"),
        ({"x": np.ones(2, np.uint8)}, {"dtypes": {"x": "BF16"}}, "eight bits or fewer"),
    ],
)
def test_what_is_not_written(tensors: Any, options: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        save_safetensors(tmp_path / "x.safetensors", tensors, **options)
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_jax_also_sharded_ones_and_big_endian_ones(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    x = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
    save_safetensors(
        tmp_path / "x.safetensors",
        {"x": jax.device_put(x, NamedSharding(mesh, P(None, "x"))), "b": np.array([1, 2], ">i4")},
    )
    read = Checkpoint(tmp_path / "x.safetensors")
    assert read["x"].tobytes() == np.asarray(x).tobytes()
    assert read["b"].tolist() == [1, 2]


def test_similar_names_are_named() -> None:
    with pytest.raises(KeyError, match=re.escape("similar: a.F8_E4M3")):
        Checkpoint(LIBRARY)["a.F8_E4M3FN"]
