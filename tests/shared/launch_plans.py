"""Plans for the tests of the launcher: kernels that are only names, and a strategy for all of the format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hypothesis import strategies as st

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
    dims = draw(st.lists(st.integers(1, 1 << 32), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(0, 1 << 30), min_size=rank - 1, max_size=rank - 1))
    box = draw(st.lists(st.integers(1, 256), min_size=rank - 1, max_size=rank - 1))
    return TensorMap(
        draw(buffers),
        draw(st.sampled_from(("uint8", "float8_e4m3fn", "uint8"))),
        tuple(dims),
        tuple(16 * stride for stride in strides),
        (draw(st.sampled_from((16, 32, 64, 128))), *box),
        swizzle=draw(st.sampled_from((0, 128))),
        l2_promotion=draw(st.sampled_from((0, 64, 128, 256))),
    )


kernels = st.builds(
    FakeKernel,
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,30}", fullmatch=True),
    st.binary(max_size=4),
    st.sampled_from(("90a", "90", "100f", "120")),
)
launches = st.builds(
    lambda kernel, cluster, grid, **options: Launch(
        kernel=kernel, cluster=cluster, grid=(cluster * grid[0], *grid[1:]), **options
    ),
    kernel=kernels,
    cluster=st.integers(1, 16),
    grid=st.tuples(st.integers(1, 1 << 20), st.integers(1, 65535), st.integers(1, 65535)),
    block=st.integers(1, 1024),
    params=st.lists(st.one_of(buffers, scalars, tensor_maps()), max_size=8).map(tuple),
    shared_memory=st.integers(0, 232_448),
    pdl=st.booleans(),
)
memsets = st.builds(
    lambda index, size, value: Memset(Result(index), size, value),
    st.integers(0, 63),
    st.integers(1, 1 << 40),
    st.integers(0, 255),
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
