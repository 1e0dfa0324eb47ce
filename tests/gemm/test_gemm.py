"""Dense GEMMs against NumPy float64: layouts, C, result dtypes, scale blocks, FP8 types."""

from __future__ import annotations

import logging
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jax_deepgemm as jdg
from jax_deepgemm import QuantizedArray
from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm import op as ops
from jax_deepgemm.ops.gemm import padding, reference
from tests.shared import gemm_oracle as oracle
from tests.shared.arrays import normal
from tests.shared.cases import (
    BLOCK,
    EDGE_SHAPES,
    FP8_PAIRS,
    LAYOUTS,
    OUT_DTYPES,
    ROW,
    ZERO_SHAPES,
    Case,
    edges,
)

SIZES = st.integers(1, 160)
SMALL_EDGES = [shape for shape in EDGE_SHAPES if np.prod(shape) < 2e7]


def stored(layout: str, a: Any, sa: Any, b: Any, sb: Any) -> list[Any]:
    """K-major operands as the layout stores them."""
    first = (a.T, sa.T) if layout[0] == "t" else (a, sa)
    second = (b.T, sb.T) if layout[1] == "n" else (b, sb)
    return [first, second]


def fp8_gemm(case: Case, arrays: list[Any], **options: Any) -> jax.Array:
    a, b = stored(case.layout, *arrays[:4])
    return getattr(jdg, f"fp8_gemm_{case.layout}")(a, b, *arrays[4:], out_dtype=case.out, **options)


def bf16_gemm(case: Case, arrays: list[Any], **options: Any) -> jax.Array:
    return getattr(jdg, f"bf16_gemm_{case.layout}")(*arrays, out_dtype=case.out, **options)


def check_fp8(case: Case) -> None:
    arrays = oracle.fp8_operands(case)
    got = fp8_gemm(case, arrays)
    assert got.dtype == jnp.dtype(case.out)
    oracle.assert_rounded(got, oracle.fp8_float64(case, *arrays), case.k)


def check_bf16(case: Case) -> None:
    arrays = oracle.bf16_operands(case)
    got = bf16_gemm(case, arrays)
    assert got.dtype == jnp.dtype(case.out)
    oracle.assert_rounded(got, oracle.bf16_float64(case, *arrays), case.k)


@settings(max_examples=25, deadline=None)
@given(
    m=SIZES,
    n=st.integers(1, 300),
    k=st.integers(1, 400),
    layout=st.sampled_from(LAYOUTS),
    out=st.sampled_from(OUT_DTYPES),
    accumulate=st.booleans(),
    b_block=st.sampled_from((BLOCK, ROW)),
    dtypes=st.sampled_from((("float8_e4m3fn", "float8_e4m3fn"), *FP8_PAIRS)),
)
def test_fp8_drawn(m, n, k, layout, out, accumulate, b_block, dtypes):
    check_fp8(Case(m, n, k, out, accumulate, b_block, *dtypes, layout=layout))


@settings(max_examples=25, deadline=None)
@given(
    m=SIZES,
    n=SIZES,
    k=st.integers(1, 300),
    layout=st.sampled_from(LAYOUTS),
    out=st.sampled_from(OUT_DTYPES),
    accumulate=st.booleans(),
)
def test_bf16_drawn(m, n, k, layout, out, accumulate):
    check_bf16(Case(m, n, k, out, accumulate, layout=layout))


@pytest.mark.parametrize("case", [c for c in edges() if (c.m, c.n, c.k) in SMALL_EDGES], ids=str)
def test_edges(case):
    check_fp8(case)
    check_bf16(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=("", "c"))
def test_empty(shape, layout, accumulate):
    """An empty sum is C, or zeros; an empty result is empty."""
    for out in OUT_DTYPES:
        case = Case(*shape, out=out, accumulate=accumulate, layout=layout)
        check_fp8(case)
        check_bf16(case)


def test_empty_has_zero_gradients():
    x, w = jnp.zeros((4, 0), jnp.bfloat16), jnp.zeros((8, 0), jnp.bfloat16)
    loss = lambda x, w, c: bf16_gemm(Case(4, 8, 0), [x, w, c]).astype(jnp.float32).sum()  # noqa: E731
    dx, dw, dc = jax.grad(loss, (0, 1, 2))(x, w, jnp.ones((4, 8), jnp.bfloat16))
    assert dx.shape == (4, 0)
    assert dw.shape == (8, 0)
    assert np.all(np.asarray(dc) == 1)


def test_quantized_array_says_its_block():
    """With n = 1 both scale blocks have scales of one shape and one meaning."""
    for n in (1, 2, 200):
        w = normal(0, n, 256, dtype=jnp.float32)
        x = jdg.quantize(normal(1, 8, 256, dtype=jnp.float32))
        for block in (BLOCK, ROW):
            q = jdg.quantize(w, block)
            got = jdg.fp8_gemm_nt(x, q, out_dtype=jnp.float32)
            bare = jdg.fp8_gemm_nt((x.values, x.scales), (q.values, q.scales), out_dtype=jnp.float32)
            exact = np.asarray(jdg.dequantize(x), np.float64) @ np.asarray(jdg.dequantize(q), np.float64).T
            oracle.assert_rounded(got, exact, 256)
            np.testing.assert_array_equal(got, bare)


def test_quantised_product_is_near_the_unquantised_one():
    x, w = (normal(i, *shape) for i, shape in enumerate(((64, 1024), (192, 1024))))
    y = jdg.fp8_gemm_nt(jdg.quantize(x), jdg.quantize(w, BLOCK))
    assert oracle.calc_diff(y, oracle.bf16_float64(Case(64, 192, 1024), x, w)) < 1e-3


def test_numpy_operands_and_out_dtype_spellings():
    case = Case(3, 5, 130)
    arrays = [np.asarray(x) for x in oracle.fp8_operands(case)]
    for out in ("float32", jnp.float32, np.float32, np.dtype("float32")):
        got = jdg.fp8_gemm_nt((arrays[0], arrays[1]), (arrays[2], arrays[3]), out_dtype=out)
        oracle.assert_rounded(got, oracle.fp8_float64(case, *arrays), 130)


def test_c_is_added_before_the_one_rounding():
    """bf16(c + ab), not bf16(c + bf16(ab)): 256 + 1.5 + rounding of 1.0078125 would differ."""
    a = jnp.full((1, 16), 0.0625, jnp.bfloat16)
    b = jnp.full((1, 16), 1.0078125, jnp.bfloat16)
    c = jnp.full((1, 1), 256.0, jnp.bfloat16)
    exact = 256 + 1.0078125
    assert float(jdg.bf16_gemm_nt(a, b, c)[0, 0]) == float(jnp.bfloat16(exact)) == 258.0
    assert (
        float(jnp.bfloat16(256) + jnp.bfloat16(1.0)) == 256.0
    )  # what rounding the product to 1 first would give


def test_reference_matches_blockwise_sums():
    """Scales multiplied into operands = scales multiplied onto partial sums, to float32 rounding."""
    for b_block in (BLOCK, ROW):
        case = Case(16, 130, 1000, out="float32", b_block=b_block)
        arrays = oracle.fp8_operands(case)
        (got,) = reference.fp8_gemm(*arrays, out_dtype=jnp.float32)
        assert oracle.calc_diff(got, oracle.fp8_float64(case, *arrays)) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s in SMALL_EDGES if s[0] < 200], ids=str)
def test_padding_keeps_products(shape, layout):
    """What runs in front of the kernels changes no result, gives rows of 16 bytes, and leaves C alone."""
    case = Case(*shape, out="float32", layout=layout, accumulate=True)
    a, b, c = oracle.bf16_operands(case)
    padded = padding.bf16_rows(a, b, c, layout=layout, out_dtype=jnp.float32)
    assert padded[2] is c
    assert all(x.shape[-1] % 8 == 0 for x in padded[:2])
    (got,) = reference.bf16_gemm(*padded[:2], layout=layout, out_dtype=jnp.float32)
    (want,) = reference.bf16_gemm(a, b, layout=layout, out_dtype=jnp.float32)
    np.testing.assert_allclose(got[: case.m, : case.n], want, rtol=1e-5, atol=1e-2)
    if layout != "nt":
        return
    arrays = oracle.fp8_operands(case)
    wide = padding.fp8_rows(*arrays, out_dtype=jnp.float32)
    assert wide[4] is arrays[4]
    assert all(x.shape[-1] * x.dtype.itemsize % 16 == 0 for x in wide[:4])
    assert wide[0].shape[-1] == wide[2].shape[-1] == -(-case.k // 16) * 16
    values = [wide[0], wide[1][:, : -(-case.k // 128)], wide[2], wide[3][:, : -(-case.k // 128)]]
    (got,) = reference.fp8_gemm(*values, out_dtype=jnp.float32)
    (want,) = reference.fp8_gemm(*arrays[:4], out_dtype=jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-2)


def test_padding_works_under_a_leading_dimension_and_passes_what_fits():
    x = jnp.ones((3, 5, 100), jnp.bfloat16)
    a, b = padding.bf16_rows(x, x, layout="nt")
    assert a.shape == b.shape == (3, 5, 104)
    assert float(a[0, 0, 100:].sum()) == 0
    whole = jnp.ones((5, 104), jnp.bfloat16)
    assert padding.bf16_rows(whole, whole, layout="nt")[0] is whole


def test_notes_are_logged_once_per_shape(caplog):
    note_once.cache_clear()
    case = Case(4, 6, 40, layout="nn")
    with caplog.at_level(logging.INFO, logger="jax_deepgemm"):
        for _ in range(2):
            fp8_gemm(case, oracle.fp8_operands(case))
            padding.fp8_rows(*oracle.fp8_operands(case))
    transposed = [r.getMessage() for r in caplog.records if "transposed" in r.getMessage()]
    copied = [r.getMessage() for r in caplog.records if "is copied to" in r.getMessage()]
    assert len(transposed) == 1
    assert "b [40, 6]" in transposed[0]
    assert "fp8_gemm_nt" in transposed[0]
    assert len(copied) == 4
    assert any("float8_e4m3fn[4, 40]" in text and "[4, 48]" in text for text in copied)


def test_num_sms_comes_from_the_configuration():
    def num_sms(**options: Any) -> int | None:
        x = jnp.ones((2, 16), jnp.bfloat16)
        jaxpr = jax.make_jaxpr(lambda x: jdg.bf16_gemm_nt(x, x, **options))(x)
        return next(e.params["num_sms"] for e in jaxpr.eqns if e.primitive.name.startswith("bf16_gemm"))

    assert num_sms() is None
    assert num_sms(num_sms=7) == 7
    with jdg.config.use(num_sms=100):
        assert num_sms() == 100
        assert num_sms(num_sms=7) == 7


def test_ops_have_the_documented_names():
    x = QuantizedArray(jnp.ones((2, 128), jnp.float8_e4m3fn), jnp.ones((2, 1)), (1, 128))
    text = str(jax.make_jaxpr(lambda: jdg.fp8_gemm_nt(x, x, jnp.ones((2, 2), jnp.bfloat16)))())
    assert "fp8_gemm_row_add" in text
    assert ops.FP8_GEMM[128, 128][0].name == "fp8_gemm_block"
    assert ops.BF16_GEMM["tn"].name == "bf16_gemm_tn"
