"""Grouped GEMMs with their kernels, compiled for eight H200s on a machine without any (see test_aot.py)."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from tests.gemm import test_aot
from tests.gemm.test_aot import BF16, F32
from tests.shared import op_checks

pytestmark = test_aot.pytestmark
F8, I32 = jnp.float8_e4m3fn, jnp.int32
M, N, K, G = 512, 576, 704, 4


def m_fp8(a: Any, sa: Any, b: Any, sb: Any, s: Any, out_sharding: Any = None) -> Any:
    return jdg.m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), s, out_sharding=out_sharding)


def masked(a: Any, b: Any, counts: Any, out_sharding: Any = None) -> Any:
    return jdg.m_grouped_bf16_gemm_nt_masked(a, b, counts, 16, out_sharding=out_sharding)


def k_fp8(a: Any, sa: Any, b: Any, sb: Any, s: Any, out_sharding: Any = None) -> Any:
    return jdg.k_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), s, out_sharding=out_sharding)


FP8_TYPES = [((M, K), F8), ((M, 6), F32), ((G, N, K), F8), ((G, 5, 6), F32), ((G,), I32)]
BF16_TYPES = [((M, K), BF16), ((G, N, K), BF16), ((G,), I32)]
MASKED_TYPES = [((G, 64, K), BF16), ((G, N, K), BF16), ((G,), I32)]
INNER_TYPES = [((N, K), F8), ((N, 6), F32), ((M, K), F8), ((M, 6), F32), ((G,), I32)]
ROWS: list[tuple[str, Any, Any, tuple[P, ...], P, int, tuple[str, ...]]] = [
    ("tensor parallel", m_fp8, FP8_TYPES, (P("x"), P("x"), P(None, "y"), P(), P()), P("x", "y"), 1, ()),
    (
        "sum over k",
        m_fp8,
        FP8_TYPES,
        (P(None, "y"), P(), P(None, None, "y"), P(), P()),
        P(),
        1,
        ("all-reduce",),
    ),
    ("experts", m_fp8, FP8_TYPES, (P("x"), P("x"), P("y"), P("y"), P()), P("x"), 1, ("all-reduce",)),
    ("masked", masked, MASKED_TYPES, (P("y"), P("y"), P("y")), P("y"), 1, ()),
    ("wgrad", k_fp8, INNER_TYPES, (P(None, "y"), P(), P(None, "y"), P(), P()), P(), 1, ("all-reduce",)),
    ("wgrad of experts", k_fp8, INNER_TYPES, (P("x"), P("x"), P(), P(), P()), P("y", "x"), 1, ()),
]


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_collectives(row: Any, mode: str) -> None:
    """One launch each, and no collective that is not needed."""
    pytest.importorskip("cuda.core")
    _, fn, types, specs, out, launches, expected = row
    hlo = test_aot.compile_on_h200s(fn, types, specs, out, mode)
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == launches
    assert op_checks.collectives(hlo) == Counter(expected)


def test_sizes_are_read_by_the_kernel() -> None:
    """No prefix sums of group sizes in front of a launch, and none of its operands is copied."""
    pytest.importorskip("cuda.core")
    one = jax.sharding.SingleDeviceSharding(test_aot.devices()[0])
    types = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in BF16_TYPES]
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32)
    hlo = jax.jit(run).lower(*types).compile().as_text()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 1
    assert " fusion(" not in hlo
    assert " copy(" not in hlo


def test_shared_experts_are_not_repeated_under_vmap() -> None:
    pytest.importorskip("cuda.core")
    one = jax.sharding.SingleDeviceSharding(test_aot.devices()[0])
    (a, x), b, (s, i) = BF16_TYPES
    types = [((3, *a), x), b, ((3, *s), i)]
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in types]
    run = jax.vmap(jdg.m_grouped_bf16_gemm_nt_contiguous, (0, None, 0))
    hlo = jax.jit(run).lower(*structs).compile().as_text()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 1
    assert f"bf16[3,{G},{N},{K}]" not in hlo
