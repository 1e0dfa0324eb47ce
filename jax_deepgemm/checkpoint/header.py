"""The safetensors format: types, and a header that is checked before a byte of a tensor is looked at.

8 bytes     N, little endian
N bytes     JSON: {"name": {"dtype": "F8_E4M3", "shape": [n, k], "data_offsets": [begin, end]}, ..}
the rest    tensors, row-major, little endian, without a gap between them
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

LENGTH = 8
"""Bytes of N."""
LARGEST_HEADER = 100_000_000
"""Bytes; what the format's own library accepts."""
METADATA = "__metadata__"

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "C64": np.complex64,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
"""Types of whole bytes."""
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Types of fewer bits: their shapes count numbers, and they are read as bytes."""
RANKS = ("BOOL", *PACKED, *(name for name in DTYPES if name != "BOOL"))
"""Types in the order of the format's library, which sorts tensors by it, the last first: all are aligned."""
NAMES = {kind: name for name, kind in DTYPES.items()}


def bits_of(dtype: str) -> int:
    """Bits of one number."""
    return PACKED[dtype] if dtype in PACKED else 8 * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor: its type and shape, and where it lies behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def stored(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of the numpy array: numbers, or bytes along the last dimension of packed ones."""
        if self.dtype in PACKED:
            *lead, last = self.shape or (1,)
            return np.dtype(np.uint8), (*lead, last * PACKED[self.dtype] // 8)
        return DTYPES[self.dtype], self.shape


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, the file's own words, and where tensors begin."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    begin: int


def length_of(first: bytes, size: int, where: str) -> int:
    """N, of the first eight bytes of a file of `size` bytes."""
    if len(first) < LENGTH:
        raise ValueError(
            f"{where} has {len(first)} bytes, a safetensors file begins with {LENGTH}: it is cut off."
        )
    length = int.from_bytes(first, "little")
    if length > LARGEST_HEADER:
        raise ValueError(
            f"{where} begins with {first!r}, a header of {length} bytes, more than the format's "
            f"{LARGEST_HEADER}: this is no safetensors file."
        )
    if LENGTH + length > size:
        raise ValueError(
            f"{where} has {size} bytes, its header alone needs {LENGTH + length}: it is cut off. Download it "
            "again."
        )
    return length


def parse(text: bytes, size: int, where: str) -> Header:
    """The header of a file of `size` bytes, from its JSON text."""
    found = _json(text, where)
    metadata = found.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: {METADATA} is {metadata!r}, need a map of strings to strings.")
    entries = {name: _entry(name, said, where) for name, said in found.items()}
    _check_extent(entries, size - LENGTH - len(text), where)
    return Header(entries, metadata, LENGTH + len(text))


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the header is no JSON object in UTF-8: {error}.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _entry(name: str, said: Any, where: str) -> Entry:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(said, dict) or set(said) != keys:
        raise ValueError(f"{where}: tensor {name!r} is described by {said!r}, need {sorted(keys)}.")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in PACKED):
        raise ValueError(
            f"{where}: tensor {name!r} has dtype {dtype!r}, which this reader does not know. It knows "
            f"{', '.join((*DTYPES, *PACKED))}."
        )
    if not _sizes(shape):
        raise ValueError(f"{where}: tensor {name!r} has shape {shape!r}, need a list of sizes.")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: tensor {name!r} has data_offsets {offsets!r}, need [begin, end].")
    bits, held = bits_of(dtype) * math.prod(shape), offsets[1] - offsets[0]
    row = bits_of(dtype) * (shape[-1] if shape else 1)
    if row % 8:
        raise ValueError(
            f"{where}: tensor {name!r} is {dtype} {shape}: rows of {row} bits, need whole bytes in each row."
        )
    if bits != 8 * held:
        raise ValueError(
            f"{where}: tensor {name!r} is {dtype} {shape}, {bits // 8} bytes, its data_offsets {offsets} are "
            f"{held} bytes."
        )
    return Entry(dtype, tuple(shape), *offsets)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_extent(entries: dict[str, Entry], held: int, where: str) -> None:
    """Tensors follow each other, from the end of the header to that of the file."""
    end, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > held:
            raise ValueError(
                f"{where}: tensor {name!r} lies at bytes {entry.begin} to {entry.end} behind the header, "
                f"where the file has {held}: it is cut off, or the header is wrong. Download it again."
            )
        if entry.begin != end:
            fault = "overlaps" if entry.begin < end else f"leaves {entry.begin - end} bytes free behind"
            raise ValueError(
                f"{where}: tensor {name!r} begins at byte {entry.begin} and {fault} {last}, which ends at "
                f"{end}. The format has tensors side by side."
            )
        end, last = entry.end, repr(name)
    if end != held:
        raise ValueError(f"{where}: {held - end} bytes follow {last}, the last tensor; need none.")


def encode(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """N and the header of tensors (name, dtype, shape) in this order, padded so that they begin at a
    multiple of eight bytes."""
    said: dict[str, Any] = {METADATA: metadata} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + bits_of(dtype) * math.prod(shape) // 8
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text
