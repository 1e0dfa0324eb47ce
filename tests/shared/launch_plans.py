"""Plans for the tests of the launcher: kernels that are only names, and a strategy for all of the format."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from jax_deepgemm.core.chip import shared_memory_of
from jax_deepgemm.core.launch import (
    Copy,
    Launch,
    LaunchPlan,
    Memset,
    Operand,
    Result,
    Scalar,
    Scratch,
    TensorMap,
)
from jax_deepgemm.core.parameters import TENSOR_TYPES


@dataclass(frozen=True)
class FakeKernel:
    """As much of a CompiledKernel as plans use; its cubin is not code."""

    name: str = "fake_kernel"
    cubin: bytes = b"not a cubin"
    arch: str = "90a"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.cubin).hexdigest()


def fake_launch(*params, kernel=None, grid=(4, 1, 1), **options) -> Launch:
    return Launch(kernel or FakeKernel(), grid=grid, block=128, params=params, **options)


def matrix_map(buffer=None, **changes) -> TensorMap:
    fields = {
        "dtype": "bfloat16",
        "dims": (512, 100),
        "strides": (1024,),
        "box": (64, 128),
        "swizzle": 128,
    } | changes
    return TensorMap(buffer or Operand(0), **fields)


def sample_plan() -> LaunchPlan:
    """Every kind of step and parameter once."""
    first = fake_launch(
        matrix_map(),
        Result(0, 64),
        Scratch(1),
        Scalar(-7, "int32"),
        Scalar(2**63, "uint64"),
        Scalar(1.5, "float32"),
        grid=(132, 2, 3),
        cluster=2,
        shared_memory=200_000,
        pdl=True,
    )
    second = fake_launch(Operand(1), kernel=FakeKernel("other_kernel", b"other", "100f"))
    return LaunchPlan((Memset(Scratch(1), 4096), first, second, first), (128, 4096), "sample [m=100] µ")


def newest_plan() -> LaunchPlan:
    """Every field of version 3 once."""
    first = fake_launch(
        matrix_map(dtype="tfloat32", box=(32, 128)),
        TensorMap(Operand(1, 32), "float4_e2m1fn", (512, 100), (256,), (256, 8), swizzle=128),
        TensorMap(Operand(1, 32), "float4_e2m1fn_spaced", (512, 100), (256,), (128, 8), swizzle=128),
        Scratch(0),
        grid=(4096, 1, 1),
        cluster=2,
        cooperative=True,
        blocks_per_sm=3,
    )
    infinity = Memset(Result(0, 4), 4096, Scalar(float("-inf"), "float32"))
    return LaunchPlan((infinity, first, Memset(Scratch(0), 64, Scalar(7, "int32"))), (64,), "newest")


# As much of a cubin as is looked at before the driver gets it: a 64-bit ELF header for CUDA, with no tables.
CUBIN = struct.pack(
    "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 190, 1, 0, 64, 64, 0, 64, 56, 0, 64, 0, 0
)
KERNEL = FakeKernel("fake_kernel", CUBIN)


def launcher_plan() -> LaunchPlan:
    """What tests/core/test_launcher.py runs on a driver that writes down its calls."""
    step = fake_launch(
        matrix_map(Operand(0, 16)),
        Result(0, 4),
        Scalar(-1, "int32"),
        Scalar(1.0, "float32"),
        kernel=KERNEL,
        grid=(32, 2, 1),
        cluster=16,
        shared_memory=100_000,
        pdl=True,
    )
    return LaunchPlan((Memset(Scratch(0), 64, 255), step), (64,), "toy")


def _tensor_map_plan() -> LaunchPlan:
    """Every rank, element type, swizzle, L2 promotion and fill of version 2."""
    ranks = [TensorMap(Operand(0), "float32", (8,) * n, (256,) * (n - 1), (4,) * n) for n in range(1, 6)]
    names = ("uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16", "int16", "uint32")
    names += ("int32", "uint64", "int64", "float16", "float32", "float64", "bfloat16")
    types = [TensorMap(Result(0, 32), name, (64,), (), (32,)) for name in names]
    swizzles = [matrix_map(box=(16, 8), swizzle=n, l2_promotion=2 * n) for n in (0, 32, 64, 128)]
    filled = matrix_map(Scratch(0), fill="nan")
    return LaunchPlan(
        (fake_launch(*ranks, *types, *swizzles, filled, kernel=KERNEL),), (1 << 20,), "tensor maps"
    )


OLD_PLANS = {
    "sample": sample_plan,
    "launcher": launcher_plan,
    "tensor maps": _tensor_map_plan,
    "copy": lambda: LaunchPlan((Copy(Operand(0, 16), Result(0), 4), fake_launch(kernel=KERNEL))),
    "toy": lambda: LaunchPlan(
        (
            Launch(
                FakeKernel("toy_kernel", b"no code"), (132, 1, 1), 128, (*map(Operand, range(4)), Result(0))
            ),
        ),
        label="toy",
    ),
}
"""Plans whose bytes of version 2, as its writer made them, are kept in data/plans_of_version_2.json."""


def old_bytes(name: str, version: int = 2) -> bytes:
    """One of OLD_PLANS as it was written; version 1 had the same records, without copies."""
    kept = json.loads((Path(__file__).parent / "data" / "plans_of_version_2.json").read_text())
    data = base64.b64decode("".join(kept[name]))
    return data[:4] + struct.pack("<H", version) + data[6:]


buffers = st.builds(
    lambda kind, index, offset: kind(index, offset * 16),
    st.sampled_from((Operand, Result)),
    st.integers(0, 63),
    st.integers(0, 1 << 20),
)
scalars = st.one_of(
    st.builds(Scalar, st.integers(-(2**31), 2**31 - 1), st.just("int32")),
    st.builds(Scalar, st.integers(0, 2**32 - 1), st.just("uint32")),
    st.builds(Scalar, st.integers(-(2**63), 2**63 - 1), st.just("int64")),
    st.builds(Scalar, st.integers(0, 2**64 - 1), st.just("uint64")),
    st.builds(Scalar, st.floats(width=32), st.just("float32")),
)


@st.composite
def tensor_maps(draw) -> TensorMap:
    rank = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(sorted(TENSOR_TYPES)))
    rules = TENSOR_TYPES[dtype]
    dims = draw(st.lists(st.integers(1, 1 << 32), min_size=rank, max_size=rank))
    dims[0] = rules.dim_multiple * draw(st.integers(1, 1 << 25))
    strides = draw(st.lists(st.integers(0, 1 << 30), min_size=rank - 1, max_size=rank - 1))
    box = draw(st.lists(st.integers(1, 256), min_size=rank - 1, max_size=rank - 1))
    rows = (128,) if dtype.endswith("_spaced") else (128 // rules.bits, 512 // rules.bits, 1024 // rules.bits)
    buffer = draw(buffers)
    return TensorMap(
        dataclasses.replace(buffer, byte_offset=2 * buffer.byte_offset),
        dtype,
        tuple(dims),
        tuple(rules.alignment * stride for stride in strides),
        (draw(st.sampled_from(rows)), *box),
        swizzle=draw(st.sampled_from((0, 128))),
        l2_promotion=draw(st.sampled_from((0, 64, 128, 256))),
        fill=draw(st.sampled_from(("zeros", "nan") if "float" in dtype and rules.bits > 8 else ("zeros",))),
    )


kernels = st.builds(
    FakeKernel,
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,30}", fullmatch=True),
    st.binary(max_size=4),
    st.sampled_from(("90a", "90", "100f", "120")),
)
launches = st.builds(
    lambda kernel, cluster, grid, shared_memory, **options: Launch(
        kernel=kernel,
        cluster=cluster,
        grid=(cluster * grid[0], *grid[1:]),
        shared_memory=min(shared_memory, shared_memory_of(kernel.arch)),
        **options,
    ),
    kernel=kernels,
    cluster=st.integers(1, 16),
    grid=st.tuples(st.integers(1, 1 << 20), st.integers(1, 65535), st.integers(1, 65535)),
    block=st.integers(1, 1024),
    params=st.lists(st.one_of(buffers, scalars, tensor_maps()), max_size=8).map(tuple),
    shared_memory=st.integers(0, 232_448),
    pdl=st.booleans(),
    cooperative=st.booleans(),
    blocks_per_sm=st.integers(0, 1024),
)
memsets = st.builds(
    lambda index, offset, size, value: Memset(Result(index, 4 * offset), 4 * size, value),
    st.integers(0, 63),
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 38),
    st.one_of(st.integers(0, 255), scalars.filter(lambda scalar: scalar.num_bytes == 4)),
)
copies = st.builds(
    lambda source, target, size: Copy(source, Result(target), size),
    buffers,
    st.integers(0, 63),
    st.integers(1, 1 << 40),
)
plans = st.builds(
    LaunchPlan,
    st.lists(st.one_of(launches, memsets, copies), min_size=1, max_size=4).map(tuple),
    st.lists(st.integers(1, 1 << 40), max_size=3).map(tuple),
    st.text(max_size=30),
)
