"""Launch plans: what one custom call does on the device, as plain data.

A family turns a problem and a configuration into a `LaunchPlan`. The plan is checked when it is built, so a
plan that exists can be encoded; `encode` gives the bytes that travel in the HLO and that the native side
(`ffi/plan.cc`) reads. The format is little-endian without padding:

    header    "JDGP" | u16 version | u16 zero | u32 size of everything
    label     u16 n | n bytes of UTF-8
    kernels   u16 n | n times: 32 bytes SHA-256 of the cubin | u8 n, arch | u16 n, entry name
    scratch   u16 n | n times: u64 bytes
    steps     u16 n | n times: u8 tag (1 launch, 2 memset, 3 copy) | body
      launch  u16 kernel | u32 grid[3] | u32 block | u32 cluster | u32 shared memory | u8 flags (1: PDL)
              u16 n | n times: u8 tag (1 pointer, 2 scalar, 3 tensor map) | body
      memset  buffer | u64 bytes | u8 value
      copy    source buffer | target buffer | u64 bytes
    pointer   buffer
    scalar    u8 type | u64 bits
    tensor map  buffer | u8 type | u8 rank | u8 swizzle | u8 L2 promotion | u8 fill
                u64 dims[rank] | u64 strides[rank - 1] | u32 box[rank]
    buffer    u8 kind (0 operand, 1 result, 2 scratch) | u16 index | u64 byte offset

Readers accept the current version and the one before it: a new field goes to the end of its record, and its
reader asks for the version first.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from jax_deepgemm.jit import CompiledKernel

VERSION = 2

MAX_STEPS = 256
MAX_PARAMS = 64
MAX_TENSOR_MAPS = 32
MAX_SCRATCH = 16
MAX_BUFFERS = 64
MAX_SHARED_MEMORY = 232_448
"""Dynamic shared memory one block can have on SM90 and SM100 (227 KiB)."""
MAX_PARAM_BYTES = 32_764
_MAX_BYTES = 1 << 48
_TENSOR_MAP_BYTES = 128

# name -> (code in the format, letter of `struct`)
SCALAR_TYPES = {
    "int32": (1, "i"),
    "uint32": (2, "I"),
    "int64": (3, "q"),
    "uint64": (4, "Q"),
    "float32": (5, "f"),
}

# name -> (code of CUtensorMapDataType, bytes per element). TMA moves bytes: one-byte floats are UINT8 to it.
TENSOR_TYPES = {
    **dict.fromkeys(("uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), (0, 1)),
    **dict.fromkeys(("uint16", "int16"), (1, 2)),
    "uint32": (2, 4),
    "int32": (3, 4),
    "uint64": (4, 8),
    "int64": (5, 8),
    "float16": (6, 2),
    "float32": (7, 4),
    "float64": (8, 8),
    "bfloat16": (9, 2),
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
FILLS = {"zeros": 0, "nan": 1}


def _fail(what: str, given: object, rule: str) -> ValueError:
    return ValueError(f"{what}: got {given}; {rule}")


def _check_int(what: str, value: object, low: int, high: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= int(value) <= high:
        raise _fail(what, repr(value), f"need an integer from {low} to {high}{hint}.")


@dataclass(frozen=True)
class _Buffer:
    index: int
    byte_offset: int = 0

    def __post_init__(self) -> None:
        _check_int(f"{type(self).__name__}.index", self.index, 0, MAX_BUFFERS - 1)
        _check_int(f"{type(self).__name__}.byte_offset", self.byte_offset, 0, _MAX_BYTES)

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
            raise _fail("Scalar.dtype", repr(self.dtype), f"need one of {', '.join(SCALAR_TYPES)}.")
        if self.dtype == "float32":
            if isinstance(self.value, bool) or not isinstance(
                self.value, (int, float, np.integer, np.floating)
            ):
                raise _fail("Scalar.value", repr(self.value), "a float32 needs a number.")
            try:
                struct.pack("<f", float(self.value))
            except OverflowError:
                raise _fail("Scalar.value", repr(self.value), "it does not fit in float32.") from None
            return
        limits = np.iinfo(self.dtype)
        _check_int("Scalar.value", self.value, int(limits.min), int(limits.max), f" for {self.dtype}")

    @property
    def num_bytes(self) -> int:
        """Size of the kernel parameter."""
        return struct.calcsize("<" + SCALAR_TYPES[self.dtype][1])


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor (`CUtensorMap`) over one buffer, passed as `const __grid_constant__` of 128 bytes.

    Attributes:
      buffer: where it points; its address must be a multiple of 16 (checked at every launch).
      dtype: element type by NumPy name; one-byte floats travel as uint8.
      dims: elements per dimension, innermost first; accesses outside are filled, and stores there dropped.
      strides: bytes per step of `dims[1:]`, innermost first; multiples of 16.
      box: elements of one copy, per dimension; at most 256 each, `box[0]` a multiple of 16 bytes.
      swizzle: 0, 32, 64 or 128 bytes; `box[0]` must not be wider.
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
            raise _fail("TensorMap.buffer", repr(self.buffer), "need an Operand, Result or Scratch.")
        where = f"TensorMap of {self.buffer}"
        for field, value, allowed in (
            ("dtype", self.dtype, TENSOR_TYPES),
            ("swizzle", self.swizzle, SWIZZLES),
            ("l2_promotion", self.l2_promotion, L2_PROMOTIONS),
            ("fill", self.fill, FILLS),
        ):
            if value not in allowed:
                raise _fail(f"{where}: {field}", repr(value), f"need one of {', '.join(map(str, allowed))}.")
        for field in ("dims", "strides", "box"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check_shape(where)
        self._check_box(where)
        if self.buffer.byte_offset % 16:
            raise _fail(
                f"{where}: byte_offset", self.buffer.byte_offset, "TMA addresses are multiples of 16."
            )
        if self.fill == "nan" and TENSOR_TYPES[self.dtype][0] < 6:
            raise _fail(
                f"{where}: fill", "'nan'", f"needs a floating type; {self.dtype} moves as an integer."
            )

    def _check_shape(self, where: str) -> None:
        rank = len(self.dims)
        if not 1 <= rank <= 5:
            raise _fail(f"{where}: dims", self.dims, "TMA has 1 to 5 dimensions.")
        if len(self.strides) != rank - 1 or len(self.box) != rank:
            raise _fail(
                where,
                f"dims {self.dims}, strides {self.strides}, box {self.box}",
                f"{rank} dims need {rank - 1} strides (of all but the innermost) and {rank} box sizes.",
            )
        for i, dim in enumerate(self.dims):
            _check_int(f"{where}: dims[{i}]", dim, 1, 1 << 32)
        for i, stride in enumerate(self.strides):
            _check_int(f"{where}: strides[{i}] (bytes of dimension {i + 1})", stride, 0, (1 << 40) - 16)
            if stride % 16:
                raise _fail(
                    f"{where}: strides[{i}] (bytes of dimension {i + 1})",
                    stride,
                    "TMA strides are multiples of 16. Pad the rows with zeros, "
                    f"for instance to {-(-stride // 16) * 16} bytes.",
                )

    def _check_box(self, where: str) -> None:
        for i, size in enumerate(self.box):
            _check_int(f"{where}: box[{i}]", size, 1, 256, " (split larger boxes into several copies)")
        inner = self.box[0] * self.itemsize
        if inner % 16:
            raise _fail(
                f"{where}: box[0]", f"{self.box[0]} x {self.itemsize} bytes", "need a multiple of 16 bytes."
            )
        if self.swizzle and inner > self.swizzle:
            raise _fail(
                f"{where}: box[0]",
                f"{self.box[0]} x {self.itemsize} = {inner} bytes",
                f"swizzle {self.swizzle} allows at most {self.swizzle} bytes; use several boxes.",
            )

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return TENSOR_TYPES[self.dtype][1]

    @property
    def extent_bytes(self) -> int:
        """Bytes from the map's address to the end of its last element."""
        rows = sum((dim - 1) * stride for dim, stride in zip(self.dims[1:], self.strides))
        return rows + self.dims[0] * self.itemsize


Param: TypeAlias = Operand | Result | Scratch | Scalar | TensorMap


def _param_bytes(param: Param) -> int:
    if isinstance(param, TensorMap):
        return _TENSOR_MAP_BYTES
    return param.num_bytes if isinstance(param, Scalar) else 8


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
      kernel: from `jax_deepgemm.jit.compile_kernel`.
      grid: blocks in x, y, z.
      block: threads per block.
      params: the kernel's parameters in order: pointers, scalars, tensor maps.
      cluster: blocks per cluster, along x; above 8 is not portable and asks the device first.
      shared_memory: dynamic shared memory per block, in bytes.
      pdl: programmatic dependent launch: may start before the kernel in front of it has ended, so the kernel
        must wait (`griddepcontrol.wait`) before it touches what that kernel writes.
    """

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    block: int
    params: tuple[Param, ...]
    cluster: int = 1
    shared_memory: int = 0
    pdl: bool = False

    def __post_init__(self) -> None:
        where = f"Launch of {_kernel_name(self.kernel)}"
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "params", tuple(self.params))
        if len(self.grid) != 3:
            raise _fail(f"{where}: grid", self.grid, "need three sizes (x, y, z).")
        for axis, size, limit in zip("xyz", self.grid, ((1 << 31) - 1, 65_535, 65_535)):
            _check_int(
                f"{where}: grid {axis}", size, 1, limit, "; empty problems are answered without a kernel"
            )
        _check_int(f"{where}: block", self.block, 1, 1024)
        _check_int(f"{where}: cluster", self.cluster, 1, 16)
        if self.grid[0] % self.cluster:
            raise _fail(f"{where}: grid x", self.grid[0], f"need a multiple of the cluster, {self.cluster}.")
        _check_int(f"{where}: shared_memory", self.shared_memory, 0, MAX_SHARED_MEMORY, "; use fewer stages")
        self._check_params(where)

    def _check_params(self, where: str) -> None:
        for i, param in enumerate(self.params):
            if not isinstance(param, (_Buffer, Scalar, TensorMap)):
                raise _fail(
                    f"{where}: params[{i}]",
                    repr(param),
                    "need an Operand, Result, Scratch, Scalar or TensorMap.",
                )
        maps = sum(isinstance(param, TensorMap) for param in self.params)
        if len(self.params) > MAX_PARAMS or maps > MAX_TENSOR_MAPS:
            raise _fail(
                f"{where}: params",
                f"{len(self.params)}, {maps} of them tensor maps",
                f"at most {MAX_PARAMS} parameters and {MAX_TENSOR_MAPS} tensor maps.",
            )
        size = sum(map(_param_bytes, self.params))
        if size > MAX_PARAM_BYTES:
            raise _fail(f"{where}: params", f"{size} bytes", f"a kernel takes at most {MAX_PARAM_BYTES}.")


@dataclass(frozen=True)
class Memset:
    """Sets `num_bytes` bytes of a result or scratch buffer to `value`, in stream order."""

    buffer: Buffer
    num_bytes: int
    value: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.buffer, (Result, Scratch)):
            raise _fail(
                "Memset.buffer", repr(self.buffer), "need a Result or Scratch; operands are read-only."
            )
        _check_int("Memset.num_bytes", self.num_bytes, 1, _MAX_BYTES)
        _check_int("Memset.value", self.value, 0, 255)


@dataclass(frozen=True)
class Copy:
    """Copies `num_bytes` bytes in stream order; nothing where both are at one address.

    For kernels that update in place: XLA gives an operand's buffer to the result that it is aliased with, but
    not where it hands the custom call a slice of a larger buffer.
    """

    source: Buffer
    target: Buffer
    num_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.source, _Buffer):
            raise _fail("Copy.source", repr(self.source), "need an Operand, Result or Scratch.")
        if not isinstance(self.target, (Result, Scratch)):
            raise _fail("Copy.target", repr(self.target), "need a Result or Scratch; operands are read-only.")
        _check_int("Copy.num_bytes", self.num_bytes, 1, _MAX_BYTES)


Step: TypeAlias = Launch | Memset | Copy


@dataclass(frozen=True)
class LaunchPlan:
    """What one custom call does: launches, memsets and copies in order on one stream.

    Attributes:
      steps: executed in order.
      scratch_bytes: sizes of the scratch buffers, allocated by XLA for the time of the call.
      label: the op and its shape, for error messages.
    """

    steps: tuple[Step, ...]
    scratch_bytes: tuple[int, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "scratch_bytes", tuple(self.scratch_bytes))
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise _fail("LaunchPlan.steps", f"{len(self.steps)} steps", f"need 1 to {MAX_STEPS}.")
        for i, step in enumerate(self.steps):
            if not isinstance(step, (Launch, Memset, Copy)):
                raise _fail(f"LaunchPlan.steps[{i}]", repr(step), "need a Launch, a Memset or a Copy.")
        if len(self.scratch_bytes) > MAX_SCRATCH:
            raise _fail(
                "LaunchPlan.scratch_bytes", f"{len(self.scratch_bytes)} buffers", f"at most {MAX_SCRATCH}."
            )
        for i, size in enumerate(self.scratch_bytes):
            _check_int(f"LaunchPlan.scratch_bytes[{i}]", size, 1, _MAX_BYTES)
        if len(self.label.encode()) > 1024:
            raise _fail("LaunchPlan.label", f"{len(self.label.encode())} bytes", "at most 1024.")
        for where, buffer, needed in self.buffers():
            if isinstance(buffer, Scratch):
                check_buffer(where, buffer, needed, self.scratch_bytes)

    @property
    def kernels(self) -> tuple[CompiledKernel, ...]:
        """The distinct kernels of the plan, in order of first use."""
        found: dict[tuple[str, str], CompiledKernel] = {}
        for step in self.steps:
            if isinstance(step, Launch):
                found.setdefault((step.kernel.digest, step.kernel.name), step.kernel)
        return tuple(found.values())

    def buffers(self) -> list[tuple[str, Buffer, int]]:
        """Every buffer a step touches: (where, buffer, bytes needed from the buffer's start)."""
        uses: list[tuple[str, Buffer, int]] = []
        for i, step in enumerate(self.steps):
            if isinstance(step, Memset):
                uses.append((f"step {i} (memset)", step.buffer, step.buffer.byte_offset + step.num_bytes))
                continue
            if isinstance(step, Copy):
                for buffer in (step.source, step.target):
                    uses.append((f"step {i} (copy)", buffer, buffer.byte_offset + step.num_bytes))
                continue
            for j, param in enumerate(step.params):
                where = f"step {i} ({step.kernel.name}), parameter {j}"
                if isinstance(param, TensorMap):
                    uses.append((where, param.buffer, param.buffer.byte_offset + param.extent_bytes))
                elif not isinstance(param, Scalar):
                    uses.append((where, param, param.byte_offset))
        return uses


def check_buffer(where: str, buffer: Buffer, needed: int, sizes: tuple[int, ...]) -> None:
    """Raises ValueError unless `buffer` is one of those with these byte sizes and holds `needed` bytes."""
    if buffer.index >= len(sizes):
        raise _fail(where, str(buffer), f"there are {len(sizes)} {type(buffer).__name__.lower()} buffers.")
    if needed > sizes[buffer.index]:
        raise _fail(where, str(buffer), f"{needed} bytes are needed, it has {sizes[buffer.index]}.")


def _kernel_name(kernel: CompiledKernel) -> str:
    """Checks what the format needs of a kernel and gives its name."""
    name, digest, arch = kernel.name, kernel.digest, kernel.arch
    if not re.fullmatch(r"[A-Za-z_]\w{0,511}", name, re.ASCII):
        raise _fail("CompiledKernel.name", repr(name), 'need a C identifier (an extern "C" entry).')
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise _fail(
            f"CompiledKernel.digest of {name}", repr(digest), "need 64 lower-case hex digits (SHA-256)."
        )
    if not re.fullmatch(r"[0-9]{2,3}[af]?", arch):
        raise _fail(f"CompiledKernel.arch of {name}", repr(arch), "need a compute capability such as 90a.")
    return name


def _text(value: str, count: str) -> bytes:
    data = value.encode()
    return struct.pack("<" + count, len(data)) + data


def _encode_buffer(buffer: Buffer) -> bytes:
    kind = 0 if isinstance(buffer, Operand) else 1 if isinstance(buffer, Result) else 2
    return struct.pack("<BHQ", kind, buffer.index, buffer.byte_offset)


def _encode_param(param: Param) -> bytes:
    if isinstance(param, Scalar):
        code, letter = SCALAR_TYPES[param.dtype]
        value = float(param.value) if letter == "f" else int(param.value)
        return struct.pack("<BB", 2, code) + struct.pack("<" + letter, value).ljust(8, b"\0")
    if isinstance(param, TensorMap):
        rank = len(param.dims)
        codes = (
            TENSOR_TYPES[param.dtype][0],
            rank,
            SWIZZLES[param.swizzle],
            L2_PROMOTIONS[param.l2_promotion],
            FILLS[param.fill],
        )
        sizes = struct.pack(f"<{2 * rank - 1}Q{rank}I", *param.dims, *param.strides, *param.box)
        return b"\3" + _encode_buffer(param.buffer) + bytes(codes) + sizes
    return b"\1" + _encode_buffer(param)


def _encode_step(step: Step, kernels: dict[tuple[str, str], int]) -> bytes:
    if isinstance(step, Memset):
        return b"\2" + _encode_buffer(step.buffer) + struct.pack("<QB", step.num_bytes, step.value)
    if isinstance(step, Copy):
        buffers = _encode_buffer(step.source) + _encode_buffer(step.target)
        return b"\3" + buffers + struct.pack("<Q", step.num_bytes)
    head = struct.pack(
        "<BH6IBH",
        1,
        kernels[step.kernel.digest, step.kernel.name],
        *step.grid,
        step.block,
        step.cluster,
        step.shared_memory,
        int(step.pdl),
        len(step.params),
    )
    return head + b"".join(map(_encode_param, step.params))


def encode(plan: LaunchPlan) -> np.ndarray:
    """The plan as bytes (uint8), equal for equal plans. The cubins are not in it, their SHA-256 is.

    >>> plan = LaunchPlan((Memset(Result(0), 256),), label="zeros")
    >>> bytes(encode(plan)[:4])
    b'JDGP'
    """
    kernels = plan.kernels
    indices = {(kernel.digest, kernel.name): i for i, kernel in enumerate(kernels)}
    parts = [_text(plan.label, "H"), struct.pack("<H", len(kernels))]
    for kernel in kernels:
        parts += [bytes.fromhex(kernel.digest), _text(kernel.arch, "B"), _text(kernel.name, "H")]
    parts.append(struct.pack(f"<H{len(plan.scratch_bytes)}Q", len(plan.scratch_bytes), *plan.scratch_bytes))
    parts.append(struct.pack("<H", len(plan.steps)))
    parts += [_encode_step(step, indices) for step in plan.steps]
    body = b"".join(parts)
    header = struct.pack("<4sHHI", b"JDGP", VERSION, 0, 12 + len(body))
    return np.frombuffer(header + body, np.uint8)
