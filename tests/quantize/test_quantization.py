"""quantize and dequantize: bit for bit an independent NumPy implementation, under every transformation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm.ops.quantize import reference
from jax_deepgemm.quantization import QuantizedArray, dequantize, from_tuple, quantize, to_tuple
from tests.shared import op_checks, quant_oracle
from tests.shared.arrays import normal, optimised
from tests.shared.op_checks import OpCase, Shard

BLOCKS = ((1, 128), (128, 128), (128, 1), (1, 32))
DTYPES = ("float8_e4m3fn", "float8_e5m2")
FORMATS = ("f32", "ue8m0")


def draw(shape, dtype="float32", seed=0, spread=4):
    """Numbers over many magnitudes, within float16's range."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape)
    return np.clip(x, -6e4, 6e4).astype(np.float32).astype(jnp.dtype(dtype))


def bits(x):
    return np.asarray(x).view(np.uint8)


def assert_equals_oracle(q, x, block, dtype="float8_e4m3fn", scale_format="f32"):
    values, scales = quant_oracle.quantize(np.asarray(x), block, dtype, scale_format)
    assert (q.values.dtype.name, q.scales.dtype.name, q.block) == (dtype, "float32", block)
    np.testing.assert_array_equal(np.asarray(q.scales), scales)
    mine = np.asarray(q.values).astype(np.float32)
    np.testing.assert_array_equal(mine, values.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(mine), np.signbit(values.astype(np.float32)) & ~np.isnan(mine))


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(0, 270)),
    lead=st.integers(0, 1),
    block=st.sampled_from([*BLOCKS, (3, 5)]),
    dtype=st.sampled_from(DTYPES),
    scale_format=st.sampled_from(FORMATS),
    x_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_equals_numpy(shape, lead, block, dtype, scale_format, x_dtype, seed):
    x = draw(shape[1 - lead :], x_dtype, seed)
    q = quantize(x, block, getattr(jnp, dtype), scale_format)
    assert_equals_oracle(q, x, block, dtype, scale_format)
    expected = quant_oracle.dequantize(np.asarray(q.values), np.asarray(q.scales), block)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), expected)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_jit_equals_eager_and_numpy(block, dtype, scale_format):
    x = draw((2, 130, 200), "bfloat16")
    fn = functools.partial(quantize, block=block, dtype=getattr(jnp, dtype), scale_format=scale_format)
    for run in (fn, optimised(fn)):
        assert_equals_oracle(run(x), x, block, dtype, scale_format)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_correctly_rounded_for_every_mantissa(dtype):
    amax = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)
    top = np.float32(reference.FP8_MAX[np.dtype(dtype)])
    got = optimised(functools.partial(reference.divide_by_fp8_max, dtype=np.dtype(dtype)))(amax)
    np.testing.assert_array_equal(np.asarray(got), amax / top)


def test_reciprocals_are_correctly_rounded_for_every_mantissa():
    x = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)
    np.testing.assert_array_equal(np.asarray(optimised(reference.reciprocal)(x)), np.float32(1) / x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_extreme_magnitudes(dtype, scale_format):
    amax = np.array([3e38, 1e30, 448.0, 1e-4, 1e-20, 1e-33, 5e-36, 1e-38, 1e-44, 0.0], np.float32)
    x = amax[:, None] * np.linspace(-1, 1, 128, dtype=np.float32)
    fn = functools.partial(quantize, dtype=getattr(jnp, dtype), scale_format=scale_format)
    for run in (fn, optimised(fn)):
        assert_equals_oracle(run(x), x, (1, 128), dtype, scale_format)


def test_blocks_of_zeros_have_a_scale_that_is_not_zero():
    q = quantize(jnp.zeros((2, 128)))
    assert np.asarray(q.scales).ravel().tolist() == [2.0**-126] * 2
    assert not np.asarray(q.values.astype(jnp.float32)).any()
    assert not np.asarray(dequantize(q)).any()


@pytest.mark.parametrize("block", BLOCKS)
def test_min_amax_is_a_lower_bound_of_amax(block):
    x = draw((130, 200)) * np.float32(1e-5)
    q = optimised(functools.partial(quantize, block=block, min_amax=1e-4))(x)
    values, scales = quant_oracle.quantize(x, block, min_amax=1e-4)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), values.view(np.uint8))


@pytest.mark.parametrize("min_amax", [-1.0, float("nan"), float("inf"), None, "1e-4", True])
def test_min_amax_is_checked(min_amax):
    with pytest.raises(ValueError, match=r"min_amax is .*need a Python number from 0 on"):
        quantize(jnp.ones((2, 128)), min_amax=min_amax)


def test_largest_values_are_used():
    q = quantize(draw((64, 256)))
    assert (np.abs(np.asarray(q.values).astype(np.float32)).reshape(64, 2, 128).max(-1) == 448).all()


def test_power_of_two_scales():
    scales = np.asarray(quantize(draw((64, 256)), scale_format="ue8m0").scales)
    assert (np.frexp(scales)[0] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_nan_and_infinities_touch_no_other_element(dtype, scale_format):
    clean = draw((3, 256), "bfloat16", spread=0)
    clean[:, 7:10] = 0
    x = clean.copy()
    x[1, 7:10] = [np.nan, np.inf, -np.inf]
    fn = functools.partial(quantize, dtype=getattr(jnp, dtype), scale_format=scale_format)
    q, plain = optimised(fn)(x), fn(clean)
    assert_equals_oracle(q, x, (1, 128), dtype, scale_format)
    np.testing.assert_array_equal(q.scales, plain.scales)
    expected = np.asarray(plain.values).astype(np.float32)
    inf = np.inf if dtype == "float8_e5m2" else np.nan
    expected[1, 7:10] = [np.nan, inf, -inf]
    np.testing.assert_array_equal(np.asarray(q.values).astype(np.float32), expected)


def test_a_block_without_finite_elements():
    q = quantize(jnp.full((1, 128), jnp.nan))
    assert np.asarray(q.scales).item() == 2.0**-126
    assert np.isnan(np.asarray(dequantize(q))).all()


def test_bfloat16_is_rounded_before_quantising_also_inside_jit():
    x = draw((16, 256))
    inside = optimised(lambda x: quantize(x.astype(jnp.bfloat16)))(x)
    assert_equals_oracle(inside, x.astype(jnp.bfloat16), (1, 128))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_empty(shape, block):
    q = quantize(jnp.zeros(shape), block)
    assert_equals_oracle(q, np.zeros(shape, np.float32), block)
    assert dequantize(q).shape == shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dequantize_rounds_once(dtype):
    q = quantize(draw((4, 300), spread=1))
    expected = quant_oracle.dequantize(np.asarray(q.values), np.asarray(q.scales), (1, 128), jnp.dtype(dtype))
    got = dequantize(q, getattr(jnp, dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(bits(got), bits(expected))


def test_vmap_over_values_and_scales_of_different_levels():
    values = quantize(draw((3, 130, 200)), (128, 128)).values
    scales = quantize(draw((2, 130, 200)), (128, 128)).scales
    one = jax.vmap(lambda v, s: dequantize(QuantizedArray(v, s, (128, 128))), (None, 0))
    got = jax.vmap(one, (0, None))(values, scales)
    for i, j in np.ndindex(3, 2):
        expected = dequantize(QuantizedArray(values[i], scales[j], (128, 128)))
        np.testing.assert_array_equal(got[i, j], expected)


def test_same_bits_every_time():
    x = jnp.asarray(draw((130, 200)))
    first = quantize(x, (128, 128))
    for _ in range(5):
        again = quantize(x, (128, 128))
        assert (bits(again.values) == bits(first.values)).all()
        assert (bits(again.scales) == bits(first.scales)).all()


# Transformations and sharding ------------------------------------------------------------


def quantize_pair(block, x, out_sharding=None):
    return to_tuple(quantize(x, block))


def dequantize_pair(block, values, scales, out_sharding=None):
    return dequantize(QuantizedArray(values, scales, block))


def sharded(block, shape, *table):
    """OpCases of both directions; a row: spec of the values, of the scales, collectives of quantize."""
    everywhere = ("auto", "explicit", "shard_map")
    nests = (((0,),), ((1,), (0,))) if shape == (576, 704) else ()
    name = f"{block[0]}x{block[1]}-{'x'.join(map(str, shape))}"

    def array(seed):
        return [normal(seed, *shape)]

    def quantized(seed):
        return quantize_pair(block, *array(seed))

    forth, back = [], []
    for values, scales, sums in table:
        modes = ("auto", "explicit") if sums else everywhere
        forth.append(Shard((values,), (values, scales), sums, modes))
        back.append(Shard((values, scales), values, (), modes))
    return [
        OpCase(
            f"quantize-{name}",
            functools.partial(quantize_pair, block),
            array,
            nests,
            tuple(forth),
            tolerance=0,
        ),
        OpCase(
            f"dequantize-{name}",
            functools.partial(dequantize_pair, block),
            quantized,
            (),
            tuple(back),
            tolerance=0,
        ),
    ]


ONE = ("all-reduce",)
CASES = [
    *sharded(
        (1, 128),
        (576, 704),
        (P("y"), P("y"), ()),
        (P(("x", "y")), P(("x", "y")), ()),
        (P(None, "y"), P(), ONE),
        (P("x", "y"), P("x"), ONE),
    ),
    *sharded(
        (1, 128), (64, 1024), (P("x", "y"), P("x", "y"), ()), (P(None, ("y", "x")), P(None, ("y", "x")), ())
    ),
    *sharded(
        (128, 128),
        (576, 704),
        (P(), P(), ()),
        (P("y"), P(), ONE),
        (P("x", "y"), P(), ONE),
        (P(None, ("x", "y")), P(), ONE),
    ),
    *sharded((128, 128), (576, 1024), (P("y", "x"), P(None, "x"), ONE), (P(None, "y"), P(None, "y"), ())),
    *sharded((128, 128), (512, 512), (P("x", "y"), P("x", "y"), ())),
    *sharded((128, 1), (704, 64), (P("x", "y"), P(None, "y"), ONE), (P(None, "y"), P(None, "y"), ())),
    *sharded((1, 32), (64, 704), (P("x", "y"), P("x"), ONE), (P(None, "x"), P(None, "x"), ())),
    *sharded((128, 128), (4, 576, 256), (P("x", "y"), P("x"), ONE), (P("y"), P("y"), ())),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_transformations(check):
    check()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(2048, 1024), (4, 1024, 1024)])
def test_scales_follow_data_over_auto_axes_without_being_told(block, shape):
    """Where every cut of this mesh is at the edge of a block, the propagation of shardings knows it."""
    mesh = op_checks.make_mesh("auto")
    spec = P(*(None,) * (len(shape) - 2), "x", "y")
    x = jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, spec))
    compiled = jax.jit(functools.partial(quantize, block=block)).lower(x).compile()
    assert not op_checks.collectives(compiled.as_text())
    assert compiled(x).scales.sharding.spec == spec


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_the_all_reduce_has_the_size_of_the_scales(mode):
    mesh = op_checks.make_mesh(mode)
    x = jax.device_put(draw((576, 704)), jax.NamedSharding(mesh, P("x", "y")))
    text = jax.jit(functools.partial(quantize, block=(128, 128))).lower(x).compile().as_text()
    (line,) = [line for line in text.splitlines() if " all-reduce(" in line]
    assert "f32[5,6]" in line.split("all-reduce")[0]


def test_under_scan_and_remat():
    x = jnp.asarray(draw((3, 8, 256)))
    step = jax.checkpoint(lambda carry, x: (carry, quantize(x)))
    _, stacked = jax.jit(lambda x: jax.lax.scan(step, 0, x))(x)
    assert_equals_oracle(stacked, x, (1, 128))


# Derivatives ------------------------------------------------------------


def test_quantize_has_no_derivative_and_says_what_has():
    with pytest.raises(NotImplementedError, match=r"quantize_1x128.* no derivative.*fp8_linear"):
        jax.grad(lambda x: jnp.sum(dequantize(quantize(x))))(jnp.ones((2, 128)))


def test_dequantize_has_no_derivative_and_says_what_has():
    q = quantize(jnp.ones((2, 128)))
    with pytest.raises(NotImplementedError, match=r"dequantize_1x128.* no derivative.*fp8_linear"):
        jax.grad(lambda s: jnp.sum(dequantize(q.with_scales(s))))(q.scales)


def test_constants_may_be_quantised_inside_grad():
    w = jnp.asarray(draw((2, 128), spread=0))
    got = jax.grad(lambda x: jnp.sum(x * dequantize(quantize(w))))(jnp.ones((2, 128)))
    np.testing.assert_array_equal(got, dequantize(quantize(w)))


# Errors ------------------------------------------------------------

X = np.ones((4, 256), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(X.tolist()), TypeError, r"x is a list, need a JAX or NumPy array.*jnp\.asarray"),
        (lambda: quantize(X.astype(np.float64)), TypeError, r"x is float64, need bfloat16.*x\.astype"),
        (lambda: quantize(X, dtype="fp8"), TypeError, r"dtype is 'fp8', which is no dtype; need float8_e4m3"),
        (lambda: dequantize(quantize(X), "bf17"), TypeError, r"dtype is 'bf17', which is no dtype; need bf"),
        (lambda: quantize(X.astype(np.int32)), TypeError, r"x is int32, need bfloat16.*x\.astype"),
        (lambda: quantize(jnp.asarray(X, jnp.float8_e5m2)), TypeError, r"x is float8_e5m2, need"),
        (lambda: quantize(X[0]), ValueError, r"shape \[256\], need rank >= 2.*quantize\(x\[None\]"),
        (lambda: quantize(X, 128), ValueError, r"block is 128, need two positive integers"),
        (lambda: quantize(X, (0, 128)), ValueError, r"block is \(0, 128\), need two positive integers"),
        (lambda: quantize(X, dtype=jnp.int8), TypeError, r"dtype is int8, need float8_e4m3fn or float8_e5m2"),
        (
            lambda: quantize(X, scale_format="e8m0"),
            ValueError,
            r"scale_format is 'e8m0', need 'f32'.*'ue8m0'",
        ),
        (lambda: quantize(quantize(X)), TypeError, r"x is a QuantizedArray already.*dequantize"),
        (lambda: dequantize(X), TypeError, r"got a ndarray, need a QuantizedArray.*from_tuple"),
        (lambda: dequantize(quantize(X), jnp.int32), TypeError, r"dtype is int32, need bfloat16"),
        (
            lambda: dequantize(QuantizedArray(quantize(X).values, jnp.ones((4, 3)), (1, 128))),
            ValueError,
            r"scales of operand are \[4, 3\] for values \[4, 256\] with .*, need \[4, 2\].*Pass",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_names_at_the_top_of_the_package():
    assert (jax_deepgemm.quantize, jax_deepgemm.dequantize) == (quantize, dequantize)
    assert jax_deepgemm.QuantizedArray is QuantizedArray
    assert from_tuple.__doc__
