"""Writes library.safetensors with the format's own library (pip install safetensors; this file: 0.8.0).

    python tests/checkpoint/data/write.py

Bytes of every tensor count up from a number of their own, so `test_safetensors.py` knows them."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

TENSORS = {  # name of the type in the file: (the library's, bits, first byte)
    "BOOL": ("bool", 8, 0),
    "U8": ("uint8", 8, 1),
    "I8": ("int8", 8, 120),
    "F8_E5M2": ("float8_e5m2", 8, 60),
    "F8_E4M3": ("float8_e4m3fn", 8, 56),
    "F8_E8M0": ("float8_e8m0fnu", 8, 124),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8, 64),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8, 64),
    "I16": ("int16", 16, 2),
    "U16": ("uint16", 16, 3),
    "F16": ("float16", 16, 4),
    "BF16": ("bfloat16", 16, 5),
    "I32": ("int32", 32, 6),
    "U32": ("uint32", 32, 7),
    "F32": ("float32", 32, 8),
    "C64": ("complex64", 64, 9),
    "F64": ("float64", 64, 10),
    "I64": ("int64", 64, 11),
    "U64": ("uint64", 64, 12),
    "F4": ("float4_e2m1fn_x2", 4, 13),
}
SHAPE = [1, 2]


def contents(dtype: str, shape: list[int]) -> bytes:
    """The bytes of a tensor."""
    _, bits, first = TENSORS[dtype]
    return bytes(first + i for i in range(bits * math.prod(shape) // 8))


def main() -> None:
    import safetensors

    kept = []

    def spec(dtype: str, shape: list[int], data: bytes) -> safetensors.TensorSpec:
        kept.append(ctypes.create_string_buffer(data, max(len(data), 1)))
        return safetensors.TensorSpec(
            dtype=dtype, shape=shape, data_ptr=ctypes.addressof(kept[-1]), data_len=len(data)
        )

    def stored(shape: list[int], bits: int) -> list[int]:
        """As the library takes it: two numbers of four bits are one."""
        return shape if bits > 4 else [*shape[:-1], shape[-1] // 2]

    tensors = {
        f"a.{dtype}": spec(name, stored(SHAPE, bits), contents(dtype, SHAPE))
        for dtype, (name, bits, _) in TENSORS.items()
    }
    tensors["scalar"] = spec("float32", [], bytes([0, 0, 128, 63]))
    tensors["empty"] = spec("bfloat16", [0, 4], b"")
    tensors["größe"] = spec("uint8", [3], b"abc")
    blob = safetensors.serialize(tensors, metadata={"format": "pt"})
    Path(__file__).with_name("library.safetensors").write_bytes(blob)


if __name__ == "__main__":
    main()
