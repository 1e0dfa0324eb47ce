"""ragged_dot and ragged_dot_general against jax.lax's, and against NumPy where those have limits.

Operands are small integers, so that every dtype here is exact and results are compared bit by bit.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import ragged_dot, ragged_dot_general
from tests.shared import op_checks
from tests.shared import ragged_oracle as oracle
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard
from tests.shared.ragged_oracle import BASIC, Problem

BF16, F16, F32, I32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32
KINDS = st.sampled_from([BF16, F32])


def examples(count: int) -> Any:
    """Few, as each compiles; a failing one is shown as it was drawn."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def exact(got: Any, expected: Any) -> None:
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), np.asarray(expected).astype(np.float64))


# Values and dtypes


@examples(16)
@given(oracle.problems(), st.sampled_from([BF16, F16, F32, I32]), st.booleans())
def test_general_is_jax_and_numpy(problem: Problem, dtype: Any, wide: bool) -> None:
    lhs, rhs, sizes = problem.operands(dtype)
    preferred = F32 if wide else None
    got = jax.jit(ragged_dot_general, static_argnums=(3, 5))(
        lhs, rhs, sizes, problem.numbers, None, preferred
    )
    jaxs = lax.ragged_dot_general(lhs, rhs, sizes, problem.numbers, None, preferred)
    assert (got.shape, got.dtype) == (problem.result, jaxs.dtype)
    exact(got, jaxs)
    exact(got, oracle.ragged(lhs, rhs, problem.sizes, problem.numbers))


@examples(12)
@given(st.data(), st.sampled_from([BF16, F16, F32, I32]), st.sampled_from(["gkn", "gnk"]))
def test_basic_is_jax(data: Any, dtype: Any, layout: str) -> None:
    m, k, n, g = (data.draw(st.integers(0, high)) for high in (20, 9, 9, 5))
    sizes = np.asarray(data.draw(oracle.group_sizes(g, m)), np.int32).reshape(g)
    lhs, rhs = oracle.integers((m, k), dtype), oracle.integers((g, k, n), dtype)
    stored = rhs if layout == "gkn" else rhs.mT
    got = ragged_dot(lhs, stored, sizes, rhs_layout=layout)
    jaxs = lax.ragged_dot(lhs, rhs, sizes)
    assert got.dtype == jaxs.dtype
    exact(got, jaxs)


DTYPES = [BF16, F16, F32, jnp.int8, I32, jnp.float8_e4m3fn, jnp.complex64]


@pytest.mark.parametrize("right", [BF16, F32, jnp.int8])
def test_result_dtypes_and_refusals_are_those_of_jax(right: Any) -> None:
    def outcome(function: Any, left: Any, preferred: Any) -> Any:
        arrays = [jax.ShapeDtypeStruct(s, d) for s, d in (((6, 4), left), ((2, 4, 3), right), ((2,), I32))]
        try:
            return jax.eval_shape(
                functools.partial(function, preferred_element_type=preferred), *arrays
            ).dtype
        except TypeError as error:
            return str(error)

    for left in DTYPES:
        for preferred in (None, BF16, F16, F32, I32):
            assert outcome(ragged_dot, left, preferred) == outcome(lax.ragged_dot, left, preferred)


def test_float32_operands_are_not_rounded() -> None:
    lhs = jnp.full((4, 2), 1 + 2**-20, F32)
    assert ragged_dot(lhs, jnp.ones((1, 2, 3)), jnp.array([4]), "highest")[0, 0] == 2 + 2**-19
    mixed = ragged_dot(lhs.astype(BF16), jnp.full((1, 2, 3), 1 + 2**-20, F32), jnp.array([4]), "highest")
    assert mixed.dtype == F32
    assert mixed[0, 0] == 2 + 2**-19


def test_signatures_begin_as_those_of_jax() -> None:
    for ours, theirs in ((ragged_dot, lax.ragged_dot), (ragged_dot_general, lax.ragged_dot_general)):
        names = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(names)] == names


# Rows of no group, and sizes that make no sense


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_of_no_group_are_zero_and_not_read(dtype: Any) -> None:
    lhs, rhs = oracle.integers((8, 4), dtype).at[5:].set(jnp.nan), oracle.integers((2, 4, 3), dtype)
    exact(ragged_dot(lhs, rhs, jnp.array([2, 3])), lax.ragged_dot(lhs, rhs, jnp.array([2, 3])))
    dw = ragged_dot_general(lhs, lhs, jnp.array([2, 3]), oracle.CONTRACTION)
    assert jnp.isfinite(dw).all()


def test_a_nan_of_one_group_stays_there_where_jax_spreads_it_by_its_expansion() -> None:
    lhs, rhs = oracle.integers((4, 4), BF16), oracle.integers((2, 4, 3), BF16).at[1].set(jnp.nan)
    got = ragged_dot(lhs, rhs, jnp.array([2, 2]))
    exact(got[:2], lhs[:2] @ rhs[0])
    assert jnp.isnan(got[2:]).all()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_negative_sizes_count_as_zero_where_jax_lets_groups_overlap(dtype: Any) -> None:
    lhs, rhs, sizes = oracle.integers((6, 4), dtype), oracle.integers((3, 4, 3), dtype), np.array([2, -2, 3])
    exact(ragged_dot(lhs, rhs, sizes), oracle.ragged(lhs, rhs, sizes, BASIC))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_small_integer_sizes_are_summed_in_int32_where_jax_overflows(dtype: Any) -> None:
    lhs, rhs, sizes = jnp.ones((200, 4), dtype), jnp.ones((2, 4, 3), dtype), np.array([100, 100])
    for integer in (np.int8, np.uint8, np.int16, np.uint32):
        exact(ragged_dot(lhs, rhs, sizes.astype(integer)), oracle.ragged(lhs, rhs, sizes, BASIC))
    exact(ragged_dot(lhs, rhs, np.array([2**32 - 1, 5], np.uint32)), jnp.full((200, 3), 4))


# Transformations


def draw_call(data: Any, dtype: Any, **options: Any) -> tuple[Problem, list[jax.Array]]:
    problem = data.draw(oracle.problems(**options))
    return problem, list(problem.operands(dtype))


@examples(6)
@given(st.data(), KINDS)
def test_derivatives_of_all_modes(data: Any, dtype: Any) -> None:
    """jax.lax differentiates ragged rows only."""
    problem, (lhs, rhs, sizes) = draw_call(data, dtype)
    text, members = oracle.einsum(problem.numbers, lhs.shape, rhs.shape, problem.sizes)

    def plain(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.einsum(text, lhs, rhs, *(x.astype(dtype) for x in members), precision="highest")

    def ours(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return ragged_dot_general(lhs, rhs, sizes, problem.numbers)

    def derivatives(function: Any) -> Any:
        tangents = (oracle.integers(lhs.shape, dtype, 1), oracle.integers(rhs.shape, dtype, 2))
        d, dd = jax.jvp(function, (lhs, rhs), tangents)
        return d, dd, *jax.vjp(function, lhs, rhs)[1](oracle.integers(d.shape, dtype, 3))

    for got, expected in zip(jax.jit(derivatives, static_argnums=0)(ours), derivatives(plain), strict=True):
        assert got.dtype == dtype
        exact(got, expected)


@examples(3)
@given(st.data(), KINDS)
def test_vmap_of_any_axes_and_of_gradients(data: Any, dtype: Any) -> None:
    """jax.lax maps all three operands at axis 0 or none, and no gradients."""
    problem, arrays = draw_call(data, dtype, modes=("rows", "contraction"), shared_sizes=True)
    axes = [data.draw(st.sampled_from([None, *range(x.ndim + 1)])) for x in arrays]
    if axes == [None] * 3:
        axes[0] = 0
    sizes = [data.draw(oracle.group_sizes(len(problem.sizes), sum(problem.sizes))) for _ in range(2)]
    stacked = [
        jnp.stack([x, x[::-1] if x.ndim else x], a) if a is not None else x
        for x, a in zip(arrays, axes, strict=True)
    ]
    if axes[2] is not None:
        stacked[2] = jnp.stack([jnp.array(s, I32) for s in sizes], axes[2])

    def gradients(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> Any:
        def loss(lhs: jax.Array, rhs: jax.Array) -> Any:
            d = ragged_dot_general(lhs, rhs, sizes, problem.numbers)
            return jnp.sum(d.astype(F32) * jnp.arange(d.size).reshape(d.shape) % 3), d

        return jax.grad(loss, (0, 1), has_aux=True)(lhs, rhs)

    got, one = jax.jit(jax.vmap(gradients, axes))(*stacked), jax.jit(gradients)
    for i in range(2):
        picked = [x if a is None else jnp.take(x, i, a) for x, a in zip(stacked, axes, strict=True)]
        jax.tree.map(lambda x, y, i=i: exact(x[i], y), got, one(*picked))


def test_nested_vmap_as_jax_where_jax_can() -> None:
    arrays = [oracle.integers((2, 2, *shape), F32) for shape in ((5, 4), (3, 4, 2))]
    sizes = jnp.array([[[2, 1, 2], [0, 0, 5]], [[1, 1, 1], [4, 0, 0]]])
    nested = jax.vmap(jax.vmap(ragged_dot, (0, None, 0)), (None, 0, 0))(arrays[0][0], arrays[1][:, 0], sizes)
    for i, j in np.ndindex(2, 2):
        exact(nested[i, j], lax.ragged_dot(arrays[0][0, j], arrays[1][i, 0], sizes[i, j]))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_remat_in_scan_is_neither(dtype: Any) -> None:
    lhs, rhs, sizes = oracle.integers((6, 4), dtype), oracle.integers((3, 4, 4), dtype), jnp.array([1, 3, 1])

    def loss(rhs: jax.Array, wrap: Any) -> jax.Array:
        def step(x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, None]:
            return wrap(ragged_dot)(x, rhs, sizes) / 4, None

        return lax.scan(step, lhs, jnp.stack([sizes, sizes[::-1]]))[0].astype(F32).sum()

    remat = jax.jit(jax.grad(functools.partial(loss, wrap=jax.checkpoint)))(rhs)
    exact(remat, jax.grad(functools.partial(loss, wrap=lambda f: f))(rhs))


def test_second_derivatives() -> None:
    lhs, rhs, sizes = oracle.integers((6, 4), F32), oracle.integers((3, 4, 4), F32), jnp.array([1, 3, 1])

    def product(function: Any) -> jax.Array:
        gradient = jax.grad(lambda w: (function(lhs, w, sizes, "highest") ** 3).sum())
        return jax.jvp(gradient, (rhs,), (jnp.ones_like(rhs),))[1]

    exact(product(ragged_dot), product(lax.ragged_dot))


# Some of the groups


@examples(5)
@given(st.data(), KINDS, st.sampled_from(["rows", "contraction"]))
def test_group_offset(data: Any, dtype: Any, mode: str) -> None:
    problem, (lhs, rhs, sizes) = draw_call(data, dtype, modes=(mode,))
    groups = sizes.shape[-1]
    count = data.draw(st.integers(1, groups))
    first = data.draw(st.integers(-1, groups))
    if mode == "rows":
        rhs = lax.slice_in_dim(rhs, 0, count, axis=problem.numbers.rhs_group_dimensions[0])
    offset = data.draw(st.sampled_from([first, np.array(first), jnp.array([first])]))
    options = {"num_groups": count} if mode == "contraction" else {}
    call = functools.partial(ragged_dot_general, ragged_dot_dimension_numbers=problem.numbers, **options)
    expected = oracle.ragged(lhs, rhs, problem.sizes, problem.numbers, first, count)
    exact(call(lhs, rhs, sizes, group_offset=offset), expected)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_parts_of_the_groups_add_up_and_offsets_map(dtype: Any) -> None:
    """Expert parallelism on one device: each part has two of the six groups."""
    lhs, rhs, sizes = (
        oracle.integers((12, 4), dtype),
        oracle.integers((6, 4, 3), dtype),
        jnp.array([2, 0, 3, 1, 4, 1]),
    )

    def part(rhs: jax.Array, offset: jax.Array) -> jax.Array:
        return ragged_dot(lhs, rhs, sizes, group_offset=offset)

    def whole(rhs: jax.Array) -> jax.Array:
        return jax.vmap(part)(rhs.reshape(3, 2, 4, 3), jnp.arange(0, 6, 2)).sum(0)

    exact(jax.jit(whole)(rhs), lax.ragged_dot(lhs, rhs, sizes))
    got, expected = (
        jax.jit(jax.grad(lambda w, f=f: (f(w) ** 2).astype(F32).sum()))(rhs)
        for f in (whole, lambda w: lax.ragged_dot(lhs, w, sizes))
    )
    exact(got, expected)


# What runs


def primitives(function: Any, *arrays: Any) -> list[str]:
    return [str(eqn.primitive) for eqn in jax.make_jaxpr(function)(*arrays).jaxpr.eqns]


def numbers(lhs: str, rhs: str, ragged: str, batch: str = "b") -> lax.RaggedDotDimensionNumbers:
    """Of operands whose dimensions are letters: b the batch, g the groups; those of both are contracted."""
    both = [name for name in lhs if name in rhs and name not in batch]
    batch = "".join(name for name in lhs if name in batch)
    places = [tuple(tuple(map(side.index, names)) for side in (lhs, rhs)) for names in (both, batch)]
    return lax.RaggedDotDimensionNumbers(
        places, (lhs.index(ragged),), tuple(map(rhs.index, "g" * ("g" in rhs)))
    )


def arrays_of(*dims: str) -> list[jax.Array]:
    extent = {"b": 2, "g": 3, "m": 4, "r": 6, "k": 5, "q": 3, "n": 7, "o": 2}
    return [jnp.ones([extent[name] for name in names], BF16) for names in dims]


@pytest.mark.parametrize(
    ("lhs", "rhs", "op"),
    [
        ("rk", "gkn", "m_grouped_bf16_gemm_nn"),
        ("rk", "gnk", "m_grouped_bf16_gemm_nt"),
        ("mrkq", "gkqno", "m_grouped_bf16_gemm_nn"),
        ("brmk", "bgnok", "m_grouped_bf16_gemm_nt"),
        ("rm", "rn", "k_grouped_bf16_gemm"),
        ("brkm", "brkno", "k_grouped_bf16_gemm"),
    ],
)
def test_documented_orders_run_without_a_transposition(lhs: str, rhs: str, op: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "jax_deepgemm")
    dims = numbers(lhs, rhs, "r")
    left, right = arrays_of(lhs, rhs)
    found = primitives(lambda *arrays: ragged_dot_general(*arrays, dims), left, right, jnp.array([1, 2, 3]))
    assert found.count(op) == 1
    assert "dot_general" not in found
    assert "ragged_dot_general" not in found
    moves = [name for name in found if name == "transpose"]
    assert len(moves) == (lhs[0] == "b" and "g" not in rhs)  # groups of the result come in front of its batch
    assert not caplog.records


def test_other_orders_are_transposed_and_say_so_once(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "jax_deepgemm")
    dims = numbers("kr", "gkn", "r")
    arrays = [*arrays_of("kr", "gkn"), jnp.array([1, 2, 3])]
    for _ in range(2):
        assert "transpose" in primitives(lambda *arrays: ragged_dot_general(*arrays, dims), *arrays)
    (record,) = caplog.records
    assert "lhs [5, 6] is transposed (1, 0)" in record.message


def test_forward_and_gradients_are_three_kernels_on_cuda() -> None:
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")

    def loss(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot(lhs, rhs, sizes, None, F32).sum()

    shapes = (((64, 128), BF16), ((4, 128, 64), BF16), ((4,), I32))
    structs = [jax.ShapeDtypeStruct(*one) for one in shapes]
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*structs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_deepgemm_launch") == 3
    assert "dot_general" not in text
    assert "ragged_dot" not in text.replace("jit(ragged_dot", "")


@pytest.mark.parametrize("precision", [None, "highest", ("high", "default"), lax.Precision.HIGHEST])
def test_bfloat16_runs_on_the_grouped_op_at_any_precision(precision: Any) -> None:
    args = [*arrays_of("rk", "gkn"), jnp.array([1, 2, 3])]
    assert "m_grouped_bf16_gemm_nn" in primitives(lambda *a: ragged_dot(*a, precision), *args)


@pytest.mark.parametrize("how", ["float16", "mixed", "float16 result", "algorithm", "named algorithm"])
def test_the_rest_runs_on_jax(how: str) -> None:
    left, right = arrays_of("rk", "gkn")
    precision = {"algorithm": lax.DotAlgorithmPreset.F32_F32_F32, "named algorithm": "F32_F32_F32"}.get(how)
    preferred = F16 if how == "float16 result" else None
    left = left.astype({"float16": F16, "mixed": F32}.get(how, BF16))
    right = right.astype(left.dtype if how == "float16" else BF16)
    found = primitives(lambda *a: ragged_dot(*a, precision, preferred), left, right, jnp.array([1, 2, 3]))
    assert "ragged_dot_nn" in found


def test_precision_of_the_context_reaches_jax() -> None:
    def lowered(function: Any) -> str:
        args = [*(x.astype(F32) for x in arrays_of("rk", "gkn")), jnp.array([1, 2, 3])]
        return jax.jit(function).lower(*args).as_text()

    def within(*arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return ragged_dot(*arrays)

    assert "precision = [HIGHEST, HIGHEST]" in lowered(within)
    assert "HIGHEST" not in lowered(ragged_dot)


# Sharding


def sharded(name: str, dtype: Any, *shards: Shard) -> OpCase:
    def args(seed: int) -> list[jax.Array]:
        return [
            oracle.integers((16, 8), dtype, seed),
            oracle.integers((4, 8, 8), dtype, seed + 1),
            jnp.array([3, 0, 7, 4], I32),
        ]

    return OpCase(name, ragged_dot, args, shards=shards)


SHARDS = (
    Shard((P("x"), P(), P()), P("x"), modes=("auto",)),
    Shard((P(), P(None, None, "y"), P()), P(None, "y"), modes=("explicit",)),
    Shard((P(None, "y"), P(None, "y"), P()), P(), ("all-reduce",)),
    Shard((P(), P("y"), P()), P(), ("all-reduce",)),
)


@pytest.mark.parametrize(
    "check", op_checks.checks([sharded("f32", F32, *SHARDS), sharded("bf16", BF16, SHARDS[3])])
)
def test_sharded(check: Any) -> None:
    check()


def test_explicit_batch_and_out_sharding() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    dims = numbers("brk", "bgkn", "r")
    arrays = [oracle.integers((4, 6, 8), BF16), oracle.integers((4, 3, 8, 8), BF16)]
    sizes = jnp.array([[1, 2, 3], [0, 0, 6], [2, 2, 1], [0, 0, 0]])
    expected = lax.ragged_dot_general(*arrays, sizes, dims)
    with jax.set_mesh(mesh):
        cuts = (P("x", None, "y"), P("x", None, "y", None), P())
        placed = [jax.reshard(x, cut) for x, cut in zip((*arrays, sizes), cuts, strict=True)]
        got = jax.jit(lambda *a: ragged_dot_general(*a, dims, out_sharding=P("x")))(*placed)
        assert got.sharding.spec == P("x", None, None)
    exact(got, expected)


def test_empty_results_have_the_type_that_was_asked_for() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        lhs = jax.reshard(jnp.ones((4, 0), BF16), P("x"))
        got = jax.jit(lambda *a: ragged_dot(*a, out_sharding=P("x")))(
            lhs, jnp.ones((2, 0, 3), BF16), jnp.array([1, 2])
        )
        assert got.sharding.spec == P("x", None)
    exact(got, jnp.zeros((4, 3)))


# Quantised operands


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
def test_quantised_is_the_product_of_the_dequantised(block: tuple[int, int]) -> None:
    lhs = jdg.quantize(normal(0, 20, 256, dtype=F32), (1, 128))
    rhs = jdg.quantize(normal(1, 3, 136, 256, dtype=F32), block)
    sizes = np.array([4, 0, 11], np.int64)
    got = ragged_dot(lhs, rhs, sizes, preferred_element_type=F32, rhs_layout="gnk")
    left, right = (jdg.dequantize(x, F32) for x in (lhs, rhs))
    expected = lax.ragged_dot(left, right.mT, jnp.array(sizes), precision="highest")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    if block == (1, 128):
        return
    assert jax.eval_shape(functools.partial(ragged_dot, rhs_layout="gnk"), lhs, rhs, sizes).dtype == BF16
    stored = jdg.QuantizedArray(rhs.values.mT, rhs.scales.mT, block[::-1])
    exact(ragged_dot(lhs, stored, sizes, None, F32, allow_transpose=True), got)
    part = jdg.QuantizedArray(rhs.values[1:], rhs.scales[1:], block)
    first = (jnp.arange(20) >= 4)[:, None]
    exact(ragged_dot(lhs, part, sizes, None, F32, 1, rhs_layout="gnk"), jnp.where(first, got, 0))


# Refusals


def call(*change: Any, **options: Any) -> Any:
    """A correct call with some operands replaced: position, value, .."""

    def run() -> None:
        args: list[Any] = [*arrays_of("rk", "gkn"), np.array([1, 2, 3])]
        for i, value in zip(change[::2], change[1::2], strict=True):
            args[i] = value
        ragged_dot(*args, **options)

    return run


def general(dims: Any, **options: Any) -> Any:
    return lambda: ragged_dot_general(*arrays_of("rm", "rn"), np.array([1, 2, 3]), dims, **options)


FP8 = jnp.float8_e4m3fn
LEFT = jdg.QuantizedArray(np.ones((6, 8), FP8), np.ones((6, 1), np.float32), (1, 128))
RIGHT = jdg.QuantizedArray(np.ones((3, 8, 8), FP8), np.ones((3, 1, 1), np.float32), (128, 128))
BATCH = lax.RaggedDotDimensionNumbers((((), ()), ((0,), (0,))), (0,), ())


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (call(0, [[1.0]]), TypeError, "lhs is a list, need a jax or numpy array"),
        (call(0, LEFT), TypeError, "lhs is quantised and rhs is not, need both or neither"),
        (call(1, RIGHT), TypeError, "rhs is quantised and lhs is not.*quantize.lhs, .1, 128.."),
        (call(0, LEFT, 1, RIGHT), ValueError, "rhs_layout='gnk'; or accept.*allow_transpose=True"),
        (call(rhs_layout="nkg"), ValueError, "rhs_layout is 'nkg', need 'gkn'"),
        (call(allow_transpose=True), ValueError, "allow_transpose is for a quantised rhs"),
        (call(1, np.ones((2, 5, 7), BF16)), TypeError, "expected rhs group dimension size to be 3, got 2"),
        (call(2, np.ones(3)), TypeError, "group_sizes.dtype is subtype of np.integer"),
        (call(2, np.array([6]), group_offset=0), ValueError, "rhs holds 3 groups.*only 1"),
        (call(group_offset=0.5), TypeError, "group_offset"),
        (
            call(0, np.ones((6, 5), np.float32), config=jdg.GemmConfig(128, 128, 4)),
            ValueError,
            "no kernel .* runs these",
        ),
        (call(activation="relu"), TypeError, "activation"),
        (general(oracle.CONTRACTION, group_offset=1), ValueError, "group_offset without num_groups"),
        (
            general(oracle.CONTRACTION, group_offset=1, num_groups=4),
            ValueError,
            "num_groups is 4 .* 3 groups",
        ),
        (general(oracle.CONTRACTION, num_groups=2), ValueError, "give group_offset too"),
        (
            general((((0,), (0,)), ((), ()))),
            TypeError,
            "is a tuple, need a jax.lax.RaggedDotDimensionNumbers",
        ),
        (general(BATCH, group_offset=1), ValueError, "ragged batch dimension"),
        (general(BATCH, num_groups=1), ValueError, "num_groups=1 is for a ragged contracting dimension"),
        (lambda: ragged_dot_general(LEFT, LEFT, np.array([6]), oracle.BASIC), TypeError, "lhs is quantised"),
    ],
)
def test_refusals(function: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        function()
