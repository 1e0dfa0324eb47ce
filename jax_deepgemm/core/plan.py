"""Launch plans: what one custom call does on the device, as plain data.

A family turns a problem and a configuration into a `LaunchPlan`. The plan is checked when it is built, so a
plan that exists can be encoded; `encode` gives the bytes that travel in the HLO and that the native side
(`ffi/plan.cc`) reads. The format is little-endian without padding:

    header    "JDGP" | u16 version | u16 zero | u32 size of everything
    label     u16 n | n bytes of UTF-8
    kernels   u16 n | n times: 32 bytes SHA-256 of the cubin | u8 n, arch | u16 n, entry name
    scratch   u16 n | n times: u64 bytes
    steps     u16 n | n times: u8 tag (1 launch, 2 memset of bytes, 3 copy, 4 memset of 32 bits) | body
      launch  u16 kernel | u32 grid[3] | u32 block | u32 cluster | u32 shared memory
              u8 flags (1: PDL, 2: cooperative)
              u16 n | n times: u8 tag (1 pointer, 2 scalar, 3 tensor map) | body
              u16 blocks per SM: of grid x, at most so many for each SM of the device (0: as it stands)
      memset  buffer | u64 bytes | pattern: u8, or u32 (address and bytes are multiples of 4)
      copy    source buffer | target buffer | u64 bytes
    pointer   buffer
    scalar    u8 type | u64 bits
    tensor map  buffer | u8 type (0 to 14) | u8 rank | u8 swizzle | u8 L2 promotion | u8 fill: driver's codes
                u64 dims[rank] | u64 strides[rank - 1] | u32 box[rank]
    buffer    u8 kind (0 operand, 1 result, 2 scratch; 3, memory of another GPU, is reserved and refused)
              u16 index | u64 byte offset

Readers accept every version so far: a new field goes to the end of its record, and its reader asks for the
version first. What a version does not have is an error in its plans.

    version 2   copies
    version 3   memsets of 32 bits, cooperative launches, blocks per SM, the reserved kind of buffer, and
                tensor maps of the types 10 to 14 (FTZ, TF32, 4 bits)
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from jax_deepgemm.core.chip import shared_memory_of
from jax_deepgemm.core.parameters import (
    FILLS,
    L2_PROMOTIONS,
    MAX_BYTES,
    SCALAR_TYPES,
    SWIZZLES,
    Buffer,
    Operand,
    Param,
    Result,
    Scalar,
    Scratch,
    TensorMap,
    check_int,
    fail,
    param_bytes,
)

if TYPE_CHECKING:
    from jax_deepgemm.jit import CompiledKernel

VERSION = 3

MAX_STEPS = 256
MAX_PARAMS = 64
MAX_TENSOR_MAPS = 32
MAX_SCRATCH = 16
MAX_PARAM_BYTES = 32_764
MAX_BLOCKS_PER_SM = 1024

_BUFFER_KINDS = {Operand: 0, Result: 1, Scratch: 2}


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
      kernel: from `jax_deepgemm.jit.compile_kernel`.
      grid: blocks in x, y, z; x at most, where `blocks_per_sm` says so.
      block: threads per block.
      params: the kernel's parameters in order: pointers, scalars, tensor maps.
      cluster: blocks per cluster, along x; above 8 is not portable and asks the device first.
      shared_memory: dynamic shared memory per block, in bytes.
      pdl: programmatic dependent launch: may start before the kernel in front of it has ended, so the kernel
        must wait (`griddepcontrol.wait`) before it touches what that kernel writes.
      cooperative: the blocks may wait for each other, so all must run at once; a GPU that cannot is refused
        when the kernel is loaded.
      blocks_per_sm: grid x becomes at most so many blocks for each SM of the GPU that runs the program,
        rounded down to whole clusters (at least one). 0: grid x is as it stands.

    A persistent grid that fits every GPU of its architecture, of at most 4096 blocks:

    >>> from jax_deepgemm.jit import CompiledKernel
    >>> kernel = CompiledKernel("work", b"", "0" * 64, "90a")
    >>> Launch(kernel, (4096, 1, 1), 128, (Operand(0),), blocks_per_sm=1).grid
    (4096, 1, 1)
    """

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    block: int
    params: tuple[Param, ...]
    cluster: int = 1
    shared_memory: int = 0
    pdl: bool = False
    cooperative: bool = False
    blocks_per_sm: int = 0

    def __post_init__(self) -> None:
        where = f"Launch of {_kernel_name(self.kernel)}"
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "params", tuple(self.params))
        if len(self.grid) != 3:
            raise fail(f"{where}: grid", self.grid, "need three sizes (x, y, z).")
        for axis, size, limit in zip("xyz", self.grid, ((1 << 31) - 1, 65_535, 65_535)):
            check_int(
                f"{where}: grid {axis}", size, 1, limit, "; empty problems are answered without a kernel"
            )
        check_int(f"{where}: block", self.block, 1, 1024)
        check_int(f"{where}: cluster", self.cluster, 1, 16)
        if self.grid[0] % self.cluster:
            raise fail(f"{where}: grid x", self.grid[0], f"need a multiple of the cluster, {self.cluster}.")
        check_int(f"{where}: blocks_per_sm", self.blocks_per_sm, 0, MAX_BLOCKS_PER_SM)
        arch, most = self.kernel.arch, shared_memory_of(self.kernel.arch)
        check_int(f"{where}: shared_memory", self.shared_memory, 0, most, f" on sm_{arch}; use fewer stages")
        self._check_params(where)

    def _check_params(self, where: str) -> None:
        for i, param in enumerate(self.params):
            if not isinstance(param, (Buffer, Scalar, TensorMap)):
                raise fail(
                    f"{where}: params[{i}]",
                    repr(param),
                    "need an Operand, Result, Scratch, Scalar or TensorMap.",
                )
        maps = sum(isinstance(param, TensorMap) for param in self.params)
        if len(self.params) > MAX_PARAMS or maps > MAX_TENSOR_MAPS:
            raise fail(
                f"{where}: params",
                f"{len(self.params)}, {maps} of them tensor maps",
                f"at most {MAX_PARAMS} parameters and {MAX_TENSOR_MAPS} tensor maps.",
            )
        size = sum(map(param_bytes, self.params))
        if size > MAX_PARAM_BYTES:
            raise fail(f"{where}: params", f"{size} bytes", f"a kernel takes at most {MAX_PARAM_BYTES}.")


@dataclass(frozen=True)
class Memset:
    """Sets `num_bytes` bytes of a result or scratch buffer, in stream order.

    Attributes:
      buffer: where it begins.
      num_bytes: how far it goes.
      value: a byte, or a scalar of 4 bytes: the address and `num_bytes` are multiples of 4 then.

    >>> Memset(Result(0), 4096, Scalar(float("-inf"), "float32")).pattern.hex()
    '000080ff'
    """

    buffer: Buffer
    num_bytes: int
    value: int | Scalar = 0

    def __post_init__(self) -> None:
        if not isinstance(self.buffer, (Result, Scratch)):
            raise fail(
                "Memset.buffer", repr(self.buffer), "need a Result or Scratch; operands are read-only."
            )
        check_int("Memset.num_bytes", self.num_bytes, 1, MAX_BYTES)
        if not isinstance(self.value, Scalar):
            check_int("Memset.value", self.value, 0, 255, ", or a Scalar")
            return
        if self.value.num_bytes != 4:
            raise fail("Memset.value", repr(self.value), "need a byte, or a Scalar of 4 bytes.")
        if self.num_bytes % 4 or self.buffer.byte_offset % 4:
            raise fail(
                f"Memset of {self.buffer}",
                f"{self.num_bytes} bytes",
                "a pattern of 4 bytes needs an address and a size that are multiples of 4.",
            )

    @property
    def pattern(self) -> bytes:
        """What is repeated: one byte, or four."""
        return self.value.data if isinstance(self.value, Scalar) else bytes([self.value])


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
        if not isinstance(self.source, Buffer):
            raise fail("Copy.source", repr(self.source), "need an Operand, Result or Scratch.")
        if not isinstance(self.target, (Result, Scratch)):
            raise fail("Copy.target", repr(self.target), "need a Result or Scratch; operands are read-only.")
        check_int("Copy.num_bytes", self.num_bytes, 1, MAX_BYTES)


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
            raise fail("LaunchPlan.steps", f"{len(self.steps)} steps", f"need 1 to {MAX_STEPS}.")
        for i, step in enumerate(self.steps):
            if not isinstance(step, (Launch, Memset, Copy)):
                raise fail(f"LaunchPlan.steps[{i}]", repr(step), "need a Launch, a Memset or a Copy.")
        if len(self.scratch_bytes) > MAX_SCRATCH:
            raise fail(
                "LaunchPlan.scratch_bytes", f"{len(self.scratch_bytes)} buffers", f"at most {MAX_SCRATCH}."
            )
        for i, size in enumerate(self.scratch_bytes):
            check_int(f"LaunchPlan.scratch_bytes[{i}]", size, 1, MAX_BYTES)
        if len(self.label.encode()) > 1024:
            raise fail("LaunchPlan.label", f"{len(self.label.encode())} bytes", "at most 1024.")
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


def described(plan: LaunchPlan) -> str:
    """The plan for people: a line for each step, and for each parameter of a launch.

    >>> print(described(LaunchPlan((Memset(Result(0), 256),), label="zeros")))
    zeros
      memset result 0, 256 bytes of 00
    """
    lines = [plan.label or "launch plan"]
    for step in plan.steps:
        if isinstance(step, Memset):
            lines.append(f"  memset {step.buffer}, {step.num_bytes} bytes of {step.pattern.hex()}")
        elif isinstance(step, Copy):
            lines.append(f"  copy {step.source} to {step.target}, {step.num_bytes} bytes")
        else:
            grid = "x".join(map(str, step.grid))
            lines.append(
                f"  launch {step.kernel.name} grid={grid} block={step.block} cluster={step.cluster} "
                f"shared_memory={step.shared_memory} pdl={step.pdl}"
            )
            lines += [f"    {param}" for param in step.params]
    return "\n".join(lines)


def check_buffer(where: str, buffer: Buffer, needed: int, sizes: tuple[int, ...]) -> None:
    """Raises ValueError unless `buffer` is one of those with these byte sizes and holds `needed` bytes."""
    if buffer.index >= len(sizes):
        raise fail(where, str(buffer), f"there are {len(sizes)} {type(buffer).__name__.lower()} buffers.")
    if needed > sizes[buffer.index]:
        raise fail(where, str(buffer), f"{needed} bytes are needed, it has {sizes[buffer.index]}.")


def _kernel_name(kernel: CompiledKernel) -> str:
    """Checks what the format needs of a kernel and gives its name."""
    name, digest, arch = kernel.name, kernel.digest, kernel.arch
    if not re.fullmatch(r"[A-Za-z_]\w{0,511}", name, re.ASCII):
        raise fail("CompiledKernel.name", repr(name), 'need a C identifier (an extern "C" entry).')
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise fail(
            f"CompiledKernel.digest of {name}", repr(digest), "need 64 lower-case hex digits (SHA-256)."
        )
    if not re.fullmatch(r"[0-9]{2,3}[af]?", arch):
        raise fail(f"CompiledKernel.arch of {name}", repr(arch), "need a compute capability such as 90a.")
    return name


def _text(value: str, count: str) -> bytes:
    data = value.encode()
    return struct.pack("<" + count, len(data)) + data


def _encode_buffer(buffer: Buffer) -> bytes:
    return struct.pack("<BHQ", _BUFFER_KINDS[type(buffer)], buffer.index, buffer.byte_offset)


def _encode_param(param: Param) -> bytes:
    if isinstance(param, Scalar):
        return struct.pack("<BB", 2, SCALAR_TYPES[param.dtype][0]) + param.data.ljust(8, b"\0")
    if isinstance(param, TensorMap):
        rank = len(param.dims)
        codes = (
            param.type.code,
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
        tag = b"\4" if isinstance(step.value, Scalar) else b"\2"
        return tag + _encode_buffer(step.buffer) + struct.pack("<Q", step.num_bytes) + step.pattern
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
        step.pdl | step.cooperative << 1,
        len(step.params),
    )
    return head + b"".join(map(_encode_param, step.params)) + struct.pack("<H", step.blocks_per_sm)


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
