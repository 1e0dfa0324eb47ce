"""Functions inside a shard_map that is manual over some axes of the mesh only. That each of them is a
program there shows test_every_call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jax_deepgemm import moe
from tests.public.test_strict_settings import assert_same_bits, compiled
from tests.shared.public_calls import CALLS, Call

BY_NAME = {call.name: call for call in CALLS}
RUN = (
    "quantize: value",
    "bf16_gemm_nt: gradient",
    "fp8_gemm_nt: value",
    "m_grouped_bf16_gemm_nt_contiguous: value",
    "m_grouped_bf16_gemm_nt_masked: value",
    "k_grouped_bf16_gemm_tn_contiguous: value",
    "ragged_dot float32: gradient",
    "swiglu: gradient",
    "route groups: value",
    "dispatch, combine: gradient",
)
"""One of each family, cheap to compile."""


@functools.cache
def mesh() -> Mesh:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


def on_each_half(call: Call, *stacked: Any) -> Any:
    """The call on each device's own operands along "x"; the compiler has "y"."""

    def local(*arrays: Any) -> Any:
        result = call.fn(*jax.tree.map(lambda x: x[0], arrays))
        return jax.tree.map(lambda x: x[None], result)

    return jax.shard_map(local, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), axis_names={"x"})(*stacked)


def twice(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


@pytest.mark.parametrize("name", RUN)
def test_same_bits(name: str) -> None:
    call = BY_NAME[name]
    arrays = call.arrays()
    halves = Call(name, functools.partial(on_each_half, call), ())
    got = compiled(halves, list(twice(arrays)))(*twice(arrays))
    assert_same_bits(got, twice(compiled(call, arrays)(*arrays)))


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_experts_over_a_manual_axis(method: str) -> None:
    def layer(*args: Any) -> Any:
        y, dropped = moe.expert_parallel_moe(*args, axis="x", method=method)
        return y, dropped[None]

    arrays = BY_NAME["moe_mlp: gradient"].arrays()
    cut = P("x")
    mapped = jax.shard_map(layer, mesh=mesh(), in_specs=cut, out_specs=cut, axis_names={"x"})
    y, dropped = jax.jit(mapped).lower(*arrays).out_info
    assert (y.shape, dropped.shape) == (arrays[0].shape, (2,))
