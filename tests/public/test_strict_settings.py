"""JAX's own strict settings change nothing: the same programs, the same bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from tests.shared.public_calls import CALLS, Call

BY_NAME = {call.name: call for call in CALLS}
RUN = [
    BY_NAME[name]
    for name in (
        "quantize: value",
        "quantize_weight: value",
        "dequantize: value",
        "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: value",
        "fp8_gemm_nt vmap: value",
        "bf16_gemm_nt: gradient",
        "m_grouped_bf16_gemm_nt_contiguous: value",
        "m_grouped_bf16_gemm_nt_masked: value",
        "k_grouped_bf16_gemm_tn_contiguous: value",
        "ends_to_indices: value",
        "indices_to_ends: value",
        "ragged_dot float32: gradient",
        "swiglu: gradient",
        "route groups: gradient",
        "dispatch, combine: gradient",
        "plan_dispatch, spread_weights: value",
    )
]
"""One reference of each kind, and what is outside of ops; cheap to compile."""
EAGER = [
    BY_NAME[name]
    for name in (
        "quantize: value",
        "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: value",
        "ends_to_indices: value",
        "ragged_dot vmap: value",
        "bf16_gemm_nt: gradient",
        "route: value",
        "route groups: gradient",
        "dispatch, combine: value",
    )
]
"""Calls that reach the code outside of ops."""


@contextlib.contextmanager
def strict() -> Iterator[None]:
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        jax.checking_leaks(),
    ):
        yield


@contextlib.contextmanager
def no_nans_nor_infinities() -> Iterator[None]:
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def lower(call: Call, arrays: list[Any]) -> Any:
    def fresh(*operands: Any) -> Any:  # a function that JAX has not traced under other settings
        return call.fn(*operands)

    return jax.jit(fresh).lower(*arrays)


def compiled(call: Call, arrays: list[Any]) -> Any:
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return lower(call, arrays).compile(compiler_options=quickly)


def types(tree: Any) -> list[Any]:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def assert_same_bits(got: Any, expected: Any) -> None:
    assert types(got) == types(expected)
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert [np.asarray(x).tobytes() for x in got] == [np.asarray(x).tobytes() for x in expected]


def test_settings_are_strict() -> None:
    """The settings do hold while the calls of test_every_call are lowered."""
    (x,) = BY_NAME["quantize: value"].arrays()
    kept = []
    for function in (lambda x: x + jnp.float32(1), lambda x: x + x[0], lambda x: kept.append(x) or x):
        with strict(), pytest.raises(Exception, match=r"promotion|[Ll]eak"):
            jax.jit(function).lower(x)
    host = np.ones(3, np.float32)
    with strict(), pytest.raises(Exception, match="transfer"):
        jax.jit(lambda x: x)(host)


@pytest.mark.parametrize("call", RUN, ids=str)
def test_same_bits_with_x64_and_without_transfers(call: Call) -> None:
    arrays = call.arrays()
    expected = compiled(call, arrays)(*arrays)
    with jax.enable_x64(True), jax.transfer_guard("disallow"):
        got = compiled(call, arrays)(*arrays)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("call", EAGER, ids=str)
def test_no_operation_gives_nan_or_infinity(call: Call) -> None:
    """Eagerly, so that every operation outside of our ops is looked at."""
    arrays = call.arrays()
    with no_nans_nor_infinities():
        jax.block_until_ready(call.fn(*arrays))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_partial_sums_over_devices(axis_type: AxisType) -> None:
    """Collectives, operands recut at blocks, an addend: k is cut inside a scale block."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    a, b, c = BY_NAME["fp8_gemm_nt rows, c: value"].arrays()
    expected = jax_deepgemm.fp8_gemm_nt(a, b, c)

    def place(x: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec))

    a, b = ((place(q.values, P(None, "x")), place(q.scales, P())) for q in (a, b))
    c = place(c, P())
    options = {"out_sharding": P()} if axis_type == AxisType.Explicit else {}
    with strict():
        got = jax.jit(functools.partial(jax_deepgemm.fp8_gemm_nt, **options))(a, b, c)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=1e-2)
