"""What a launch plan gives a kernel: addresses of buffers, scalars and tensor maps, checked when built.

Their codes in the format of plans stand here; plan.py describes the format.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

MAX_BUFFERS = 64
MAX_BYTES = 1 << 48
_TENSOR_MAP_BYTES = 128

# name -> (code in the format, letter of `struct`)
SCALAR_TYPES = {
    "int32": (1, "i"),
    "uint32": (2, "I"),
    "int64": (3, "q"),
    "uint64": (4, "Q"),
    "float32": (5, "f"),
}


class TensorType(NamedTuple):
    """An element type of tensor maps, and what TMA asks for it (CUDA driver API, cuTensorMapEncodeTiled).

    Attributes:
      code: of CUtensorMapDataType.
      bits: per element.
      alignment: of the address and the strides, in bytes.
      dim_multiple: of `dims[0]`, in elements.
    """

    code: int
    bits: int
    alignment: int = 16
    dim_multiple: int = 1

    @property
    def size(self) -> str:
        """Of an element, for messages."""
        return f"{self.bits // 8} bytes" if self.bits % 8 == 0 else f"{self.bits} bits"


_4_BITS = ("uint4", "int4", "float4_e2m1fn")
_PACKED_4 = TensorType(13, 4, dim_multiple=2)
_SPACED_4 = TensorType(14, 4, alignment=32, dim_multiple=128)
# TMA moves bytes, so one-byte floats are UINT8 to it. "_ftz" turns subnormal numbers into zeros, "tfloat32"
# rounds to the numbers that tensor cores take. Elements of 4 bits need a driver of CUDA 12.8; they lie packed
# in shared memory, or "_spaced": 16 elements in 8 bytes, then a gap of 8 bytes (for loads only).
TENSOR_TYPES = {
    **dict.fromkeys(("uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), TensorType(0, 8)),
    **dict.fromkeys(("uint16", "int16"), TensorType(1, 16)),
    "uint32": TensorType(2, 32),
    "int32": TensorType(3, 32),
    "uint64": TensorType(4, 64),
    "int64": TensorType(5, 64),
    "float16": TensorType(6, 16),
    "float32": TensorType(7, 32),
    "float64": TensorType(8, 64),
    "bfloat16": TensorType(9, 16),
    "float32_ftz": TensorType(10, 32),
    "tfloat32": TensorType(11, 32),
    "tfloat32_ftz": TensorType(12, 32),
    **dict.fromkeys(_4_BITS, _PACKED_4),
    **{f"{name}_spaced": _SPACED_4 for name in _4_BITS},
}
_FLOATING_CODES = range(6, 13)
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
FILLS = {"zeros": 0, "nan": 1}


def fail(what: str, given: object, rule: str) -> ValueError:
    """The error that says what was given, and the rule."""
    return ValueError(f"{what}: got {given}; {rule}")


def check_int(what: str, value: object, low: int, high: int, hint: str = "") -> None:
    """Raises ValueError unless `value` is an integer within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= int(value) <= high:
        raise fail(what, repr(value), f"need an integer from {low} to {high}{hint}.")


@dataclass(frozen=True)
class _Buffer:
    index: int
    byte_offset: int = 0

    def __post_init__(self) -> None:
        check_int(f"{type(self).__name__}.index", self.index, 0, MAX_BUFFERS - 1)
        check_int(f"{type(self).__name__}.byte_offset", self.byte_offset, 0, MAX_BYTES)

    def __str__(self) -> str:
        offset = f" + {self.byte_offset} bytes" if self.byte_offset else ""
        return f"{type(self).__name__.lower()} {self.index}{offset}"


@dataclass(frozen=True)
class Operand(_Buffer):
    """Address of an operand of the op, `byte_offset` bytes in."""

    __str__ = _Buffer.__str__


@dataclass(frozen=True)
class Result(_Buffer):
    """Address of a result of the op, `byte_offset` bytes in."""

    __str__ = _Buffer.__str__


@dataclass(frozen=True)
class Scratch(_Buffer):
    """Address in the plan's scratch buffer `index`: uninitialised at every call, gone after it."""

    __str__ = _Buffer.__str__


@dataclass(frozen=True)
class Peer(_Buffer):
    """Memory of another GPU: a kind of buffer that the format reserves, and that nothing executes yet.

    Raises:
      ValueError: always.
    """

    def __post_init__(self) -> None:
        raise fail(
            "Peer.index",
            self.index,
            "memory of another GPU is reserved in the format of plans, and no launcher uses it yet. Move the "
            "data by a collective of jax.lax between two ops.",
        )


Buffer: TypeAlias = Operand | Result | Scratch


@dataclass(frozen=True)
class Scalar:
    """A kernel parameter passed by value.

    >>> Scalar(7168, "int32")
    Scalar(value=7168, dtype='int32')
    """

    value: int | float
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in SCALAR_TYPES:
            raise fail("Scalar.dtype", repr(self.dtype), f"need one of {', '.join(SCALAR_TYPES)}.")
        if self.dtype == "float32":
            if isinstance(self.value, bool) or not isinstance(
                self.value, (int, float, np.integer, np.floating)
            ):
                raise fail("Scalar.value", repr(self.value), "a float32 needs a number.")
            try:
                struct.pack("<f", float(self.value))
            except OverflowError:
                raise fail("Scalar.value", repr(self.value), "it does not fit in float32.") from None
            return
        limits = np.iinfo(self.dtype)
        check_int("Scalar.value", self.value, int(limits.min), int(limits.max), f" for {self.dtype}")

    @property
    def num_bytes(self) -> int:
        """Size of the kernel parameter."""
        return struct.calcsize("<" + SCALAR_TYPES[self.dtype][1])

    @property
    def data(self) -> bytes:
        """The value as the kernel gets it."""
        value = float(self.value) if self.dtype == "float32" else int(self.value)
        return struct.pack("<" + SCALAR_TYPES[self.dtype][1], value)


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor (`CUtensorMap`) over one buffer, passed as `const __grid_constant__` of 128 bytes.

    Attributes:
      buffer: where it points; its address must be a multiple of 16, or of 32 for spaced 4-bit elements
        (checked at every launch).
      dtype: element type by NumPy name, or one of TMA's own, see TENSOR_TYPES.
      dims: elements per dimension, innermost first; accesses outside are filled, and stores there dropped.
      strides: bytes per step of `dims[1:]`, innermost first; multiples of 16 (32 for spaced 4-bit
        elements).
      box: elements of one copy, per dimension; at most 256 each, `box[0]` a multiple of 16 bytes (128 spaced
        4-bit elements).
      swizzle: 0, 32, 64 or 128 bytes; `box[0]` must not be wider. Spaced 4-bit elements: 0 or 128.
      l2_promotion: 0, 64, 128 or 256 bytes fetched into L2 at once.
      fill: "zeros" or "nan" outside the dims.

    >>> a = TensorMap(Operand(0), "bfloat16", dims=(512, 100), strides=(1024,), box=(64, 128), swizzle=128)
    >>> a.extent_bytes
    102400
    """

    buffer: Buffer
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    l2_promotion: int = 256
    fill: str = "zeros"

    def __post_init__(self) -> None:
        if not isinstance(self.buffer, _Buffer):
            raise fail("TensorMap.buffer", repr(self.buffer), "need an Operand, Result or Scratch.")
        where = f"TensorMap of {self.buffer}"
        for field, value, allowed in (
            ("dtype", self.dtype, TENSOR_TYPES),
            ("swizzle", self.swizzle, SWIZZLES),
            ("l2_promotion", self.l2_promotion, L2_PROMOTIONS),
            ("fill", self.fill, FILLS),
        ):
            if value not in allowed:
                raise fail(f"{where}: {field}", repr(value), f"need one of {', '.join(map(str, allowed))}.")
        for field in ("dims", "strides", "box"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check_shape(where)
        self._check_box(where)
        if self.buffer.byte_offset % self.type.alignment:
            raise fail(
                f"{where}: byte_offset",
                self.buffer.byte_offset,
                f"TMA addresses of {self.dtype} are multiples of {self.type.alignment}.",
            )
        if self.fill == "nan" and self.type.code not in _FLOATING_CODES:
            raise fail(f"{where}: fill", "'nan'", f"needs a floating type; {self.dtype} moves as an integer.")

    def _check_shape(self, where: str) -> None:
        rank = len(self.dims)
        if not 1 <= rank <= 5:
            raise fail(f"{where}: dims", self.dims, "TMA has 1 to 5 dimensions.")
        if len(self.strides) != rank - 1 or len(self.box) != rank:
            raise fail(
                where,
                f"dims {self.dims}, strides {self.strides}, box {self.box}",
                f"{rank} dims need {rank - 1} strides (of all but the innermost) and {rank} box sizes.",
            )
        for i, dim in enumerate(self.dims):
            check_int(f"{where}: dims[{i}]", dim, 1, 1 << 32)
        if self.dims[0] % self.type.dim_multiple:
            raise fail(
                f"{where}: dims[0]",
                self.dims[0],
                f"need a multiple of {self.type.dim_multiple} elements of {self.dtype}. Pad with zeros.",
            )
        unit = self.type.alignment
        for i, stride in enumerate(self.strides):
            check_int(f"{where}: strides[{i}] (bytes of dimension {i + 1})", stride, 0, (1 << 40) - 16)
            if stride % unit:
                raise fail(
                    f"{where}: strides[{i}] (bytes of dimension {i + 1})",
                    stride,
                    f"TMA strides of {self.dtype} are multiples of {unit}. Pad the rows with zeros, "
                    f"for instance to {-(-stride // unit) * unit} bytes.",
                )

    def _check_box(self, where: str) -> None:
        for i, size in enumerate(self.box):
            check_int(f"{where}: box[{i}]", size, 1, 256, " (split larger boxes into several copies)")
        given, bits = f"{self.box[0]} x {self.type.size}", self.box[0] * self.type.bits
        if bits % 128:
            raise fail(f"{where}: box[0]", given, "need a multiple of 16 bytes.")
        if self.swizzle and bits > 8 * self.swizzle:
            raise fail(
                f"{where}: box[0]",
                f"{given} = {bits // 8} bytes",
                f"swizzle {self.swizzle} allows at most {self.swizzle} bytes; use several boxes.",
            )
        if self.type is _SPACED_4 and (self.box[0] != 128 or self.swizzle not in (0, 128)):
            raise fail(
                f"{where}: box[0] and swizzle",
                f"{self.box[0]} and {self.swizzle}",
                f"{self.dtype} needs a row of 128 elements, and swizzle 0 or 128.",
            )

    @property
    def type(self) -> TensorType:
        """What `dtype` means to TMA."""
        return TENSOR_TYPES[self.dtype]

    @property
    def extent_bytes(self) -> int:
        """Bytes from the map's address to the end of its last element."""
        rows = sum((dim - 1) * stride for dim, stride in zip(self.dims[1:], self.strides))
        return rows + self.dims[0] * self.type.bits // 8


Param: TypeAlias = Operand | Result | Scratch | Scalar | TensorMap


def param_bytes(param: Param) -> int:
    """Size of a kernel parameter."""
    if isinstance(param, TensorMap):
        return _TENSOR_MAP_BYTES
    return param.num_bytes if isinstance(param, Scalar) else 8
