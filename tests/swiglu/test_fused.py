"""quantize_both, quantize_weight, SwiGLU: against NumPy, sharded as unsharded, and the compiled kernels."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.activation import swiglu, swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Launch, decode, encode
from jax_deepgemm.ops.quantize.fused import both_op, quantize_both, quantize_weight, weight_op
from jax_deepgemm.ops.quantize.op import KERNEL_BLOCKS, quantize_op
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.quantize.sm90 import cut_of, kernel_source, sum_source
from jax_deepgemm.ops.swiglu.op import swiglu_grad_op, swiglu_op
from jax_deepgemm.quantization import quantize
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import op_checks, quant_oracle
from tests.shared.arrays import normal, normals, optimised
from tests.shared.device_code import fields_of_concept, fields_of_struct
from tests.shared.op_checks import OpCase, Shard

E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
SHAPES = ((130, 200), (1, 131), (129, 1), (0, 128))


def draw(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1, shape)).astype(np.float32).astype(dtype)


def assert_equal(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))


def oracle_both(
    x: np.ndarray, rows: int | None, dtype: str, scale_format: str, block_t: tuple[int, int] = (128, 1)
) -> list[np.ndarray]:
    counted = x.astype(np.float32)
    counted[len(x) if rows is None else max(rows, 0) :] = 0
    values, scales = quant_oracle.quantize(counted, (1, 128), dtype, scale_format)
    along_rows, scales_t = quant_oracle.quantize(counted, block_t, dtype, scale_format)
    return [values, scales, along_rows.T, scales_t]


# Against NumPy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "x_dtype", "scale_format"), [(E4M3, jnp.bfloat16, "f32"), (E5M2, jnp.float32, "ue8m0")], ids=str
)
def test_quantize_both_and_weight_equal_numpy(shape, dtype, x_dtype, scale_format):
    x, options = draw(shape, x_dtype), {"dtype": dtype, "scale_format": scale_format}
    both, weight = (optimised(functools.partial(f, **options)) for f in (quantize_both, quantize_weight))
    assert_equal(both(x), oracle_both(x, None, dtype.name, scale_format))
    square = optimised(functools.partial(quantize_both, block_t=(128, 128), **options))
    assert_equal(square(x), oracle_both(x, None, dtype.name, scale_format, (128, 128)))
    values, scales = quant_oracle.quantize(x, (128, 128), dtype.name, scale_format)
    assert_equal(weight(x), [values, scales, values.T])


def test_rows_beyond_the_limit_are_zeros_whatever_they_hold():
    limited = optimised(quantize_both)
    for rows in (-1, 0, 1, 128, 150, 260, 300):
        x = draw((260, 136))
        x[max(rows, 0) :] = np.nan
        assert_equal(limited(x, jnp.int32(rows)), oracle_both(x, rows, "float8_e4m3fn", "f32"))
    assert_equal(limited(x, jnp.array([300], jnp.int32)), limited(x, jnp.int32(300)))


def exact_swiglu(h: np.ndarray, weight: Any, dact: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
    """act, dh, dweight in float64."""
    (gate, up), d = np.split(h.astype(np.float64), 2, axis=1), dact.astype(np.float64)
    w = np.ones(len(h)) if weight is None else weight.astype(np.float64)
    s = 1 / (1 + np.exp(-gate))
    slope = s * (1 + gate * (1 - s))
    results = [
        gate * s * up * w[:, None],
        np.concatenate([d * w[:, None] * up * slope, d * w[:, None] * gate * s], axis=1),
        (d * gate * s * up).sum(axis=1),
    ]
    for result in results:
        result[rows:] = 0
    return tuple(results)


def assert_quantizes(exact: np.ndarray, values: Any, scales: Any, *turned: Any) -> None:
    """Scales within float32, values within one rounding of FP8."""
    copies = [(values, scales, (1, 128))]
    if turned:
        copies.append((turned[0].T, turned[1], (128, 1)))
    for stored, grid, block in copies:
        _, want = quant_oracle.quantize(exact.astype(np.float32), block)
        np.testing.assert_allclose(grid, want, rtol=1e-5)
        wide = quant_oracle.dequantize(np.asarray(stored), np.asarray(grid), block)
        top = np.repeat(np.repeat(want, block[0], 0), block[1], 1)[: len(exact), : exact.shape[1]]
        assert (np.abs(wide - exact) <= np.abs(exact) / 15 + top * 2**-9).all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("m", "i", "rows"), [(130, 136, 130), (200, 128, 77), (3, 5, 0)])
def test_swiglu_against_float64(m, i, rows, weighted):
    h, dact = draw((m, 2 * i)), draw((m, i), seed=1)
    weight = draw((m,), np.float32, 2) if weighted else None
    act, dh, dweight = exact_swiglu(h, weight, dact, rows)
    for poisoned in (h, dact, *([weight] if weighted else [])):
        poisoned[rows:] = np.nan
    for transposed in (True, False):
        forth, back = (
            jax.jit(functools.partial(f, transposed=transposed))
            for f in (swiglu_quantize, swiglu_grad_quantize)
        )
        assert_quantizes(act, *forth(h, weight, jnp.int32(rows)))
        *parts, got = back(h, weight, dact, jnp.int32(rows))
        assert_quantizes(dh, *parts)
        if weighted:
            np.testing.assert_allclose(got, dweight, rtol=1e-4, atol=1e-4 * np.abs(dweight).max(initial=1))
        else:
            assert got is None


def test_plain_swiglu_and_its_gradients():
    h, weight, dact = draw((6, 32), np.float32), draw((6,), np.float32, 1), draw((6, 16), np.float32, 2)
    act, dh, dweight = exact_swiglu(h, weight, dact, 6)
    got, vjp = jax.vjp(swiglu, h, weight)
    np.testing.assert_allclose(got, act, rtol=1e-4, atol=1e-5)
    for one, other in zip(vjp(jnp.asarray(dact)), (dh, dweight), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(swiglu, h, weight)[1]) if hasattr(leaf, "nbytes")]
    assert sum(leaf.nbytes for leaf in kept) == h.nbytes + weight.nbytes
    assert swiglu(h.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_leading_dimensions_and_vmap():
    x, rows = draw((2, 130, 136)), np.array([[130], [40]], np.int32)
    got = jax.jit(jax.vmap(quantize_both))(x, rows)
    assert_equal([part[1] for part in got], oracle_both(x[1], 40, "float8_e4m3fn", "f32"))
    got = jax.jit(jax.vmap(quantize_both, (None, 0)))(x[0], rows)
    assert_equal([part[1] for part in got], oracle_both(x[0], 40, "float8_e4m3fn", "f32"))
    stacked = jax.jit(quantize_weight)(x)
    values, scales = quant_oracle.quantize(x[1], (128, 128))
    assert_equal([part[1] for part in stacked], [values, scales, values.T])


def test_they_have_no_derivative_and_say_what_has():
    x = jnp.ones((2, 128))
    for function in (quantize_both, quantize_weight, swiglu_quantize):
        with pytest.raises(NotImplementedError, match=r"has no derivative.*moe_mlp"):
            jax.grad(lambda x, f=function: jnp.sum(f(x)[1]))(x)


X = np.ones((4, 256), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_both(X[None]), ValueError, r"quantize_both: x has shape \[1, 4, 256\].*jax\.vmap"),
        (
            lambda: quantize_both(X, np.float32(3)),
            ValueError,
            r"quantize_both: rows is float32\[\], need an int32",
        ),
        (lambda: quantize_weight(X.tolist()), TypeError, r"quantize_weight: x is a list"),
        (
            lambda: quantize_both(X, block_t=(1, 128)),
            ValueError,
            r"block_t is \(1, 128\), need \(128, 1\) or",
        ),
        (
            lambda: swiglu_quantize(X, block_t=(128, 128)),
            ValueError,
            r"block_t is \(128, 128\) without blocks, need row_blocks\(group_sizes, m\)",
        ),
        (
            lambda: swiglu_quantize(X[:, :3]),
            ValueError,
            r"swiglu_quantize: h has shape \[4, 3\], need \[m, 2 i\]",
        ),
        (lambda: swiglu_quantize(X, X[0]), ValueError, r"weight is float32\[256\], need float32\[4\]"),
        (
            lambda: swiglu_grad_quantize(X, None, X.astype(jnp.bfloat16)),
            ValueError,
            r"dact is bfloat16\[4, 256\], need float32\[4, 128\]",
        ),
        (lambda: swiglu(X, X), ValueError, r"weight has shape \[4, 256\].*need a factor per row, \[4\]"),
        (lambda: swiglu(X[:, :3]), ValueError, r"swiglu: h has shape \[4, 3\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Sharded as unsharded -----------------------------------------------------------------------------------

EVERY, OWN = ("auto", "explicit", "shard_map"), ("auto", "explicit")
ONE, TWO = ("all-reduce",), ("all-reduce",) * 2


def both_case(shape, *table, block_t=(128, 1)):
    def fn(x, out_sharding=None):
        return quantize_both(x, block_t=block_t)

    shards = tuple(
        Shard(
            (spec,), (spec, scales, P(*reversed((*spec, *(None,) * (2 - len(spec))))), scales_t), sums, modes
        )
        for spec, scales, scales_t, sums, modes in table
    )
    name = f"quantize_both-{shape[0]}x{shape[1]}-{block_t[1]}"
    return OpCase(name, fn, lambda seed: [normal(seed, *shape)], (((0,),),), shards, tolerance=0)


def weight_case(shape, *table):
    def fn(w, out_sharding=None):
        return quantize_weight(w)

    shards = tuple(
        Shard((spec,), (spec, scales, P(*reversed((*spec, *(None,) * (2 - len(spec)))))), sums, modes)
        for spec, scales, sums, modes in table
    )
    name = f"quantize_weight-{shape[0]}x{shape[1]}"
    return OpCase(name, fn, lambda seed: [normal(seed, *shape, dtype=F32)], (((0,),),), shards, tolerance=0)


def limited(x, rows, out_sharding=None):
    return quantize_both(x, rows)


def forward(h, weight, rows, out_sharding=None):
    return swiglu_quantize(h, weight, rows)


def backward(h, weight, dact, rows, out_sharding=None):
    return swiglu_grad_quantize(h, weight, dact, rows)


def swiglu_arrays(seed):
    """512 rows, 256 features; the limit is inside a device's piece."""
    h, dact = normals(seed, (512, 512), (512, 256))
    weights = np.random.default_rng(seed).uniform(size=512).astype(np.float32)
    return h, jnp.asarray(weights), dact, jnp.array([300], jnp.int32)


R = P("x")
ROWS_X = (P("x"), P("x"), P(None, "x"), P("x"))
CASES = [
    both_case(
        (512, 1024),
        (P("y", "x"), P("y", "x"), P("y", "x"), (), EVERY),
        (P(("x", "y")), P(("x", "y")), P(), ONE, OWN),
    ),
    both_case((130, 200), (P("x"), P("x"), P(), ONE, OWN), (P("x", "y"), P("x"), P(None, "y"), TWO, OWN)),
    both_case(
        (512, 1024),
        (P("y", "x"), P("y", "x"), P("y", "x"), (), EVERY),
        (P(("x", "y")), P(("x", "y")), P(), ONE, OWN),
        block_t=(128, 128),
    ),
    OpCase(
        "quantize_both-rows",
        limited,
        lambda seed: [normal(seed, 512, 128, dtype=F32), jnp.array([300], jnp.int32)],
        (((0, 0),), ((None, 0),), ((0, None),)),
        (
            Shard((P("y"), P()), (P("y"), P("y"), P(None, "y"), P("y"))),
            Shard((P(("x", "y")), P()), (P(("x", "y")), P(("x", "y")), P(None, ("x", "y")), P()), ONE),
        ),
        tolerance=0,
    ),
    weight_case((512, 512), (P("x", "y"), P("x", "y"), (), EVERY)),
    weight_case((576, 256), (P("y"), P(), ONE, OWN)),
    OpCase(
        "swiglu_quantize",
        forward,
        lambda seed: [swiglu_arrays(seed)[i] for i in (0, 1, 3)],
        (((0, None, 0),),),
        (
            Shard((R, R, P()), ROWS_X),
            Shard(
                (P(("x", "y")), P(("x", "y")), P()),
                (P(("x", "y")), P(("x", "y")), P(None, ("x", "y")), P()),
                ONE,
            ),
            Shard((P(), P(), P()), (P(None, "x"), P(None, "x"), P("x"), P(None, "x")), (), ("auto",)),
        ),
        tolerance=1e-6,
    ),
    OpCase(
        "swiglu_grad_quantize",
        backward,
        lambda seed: list(swiglu_arrays(seed)),
        (((0, 0, None, 0),),),
        (
            Shard((R, R, R, P()), (*ROWS_X, R)),
            Shard(
                (P(("x", "y")), P(("x", "y")), P(("x", "y")), P()),
                (P(("x", "y")), P(("x", "y")), P(None, ("x", "y")), P(), P(("x", "y"))),
                ONE,
            ),
            Shard(
                (P(), P(), P(), P()),
                (P(None, "x"), P(None, "x"), P("x"), P(None, "x"), P()),
                (),
                ("auto",),
            ),
        ),
        tolerance=1e-6,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_transformations(check):
    check()


# The kernels, without a GPU -----------------------------------------------------------------------------

PROBLEMS = [
    *(
        QuantizeProblem(kind, 256, 512, x, transposed=True, square_t=True, blocks=blocks, weighted=weighted)
        for x in ("bfloat16", "float32")
        for kind, blocks, weighted in (
            ("quantize", 0, False),
            ("quantize", 5, False),
            ("swiglu", 5, True),
            ("swiglu_grad", 5, True),
        )
    ),
    *(
        QuantizeProblem("quantize", 256, 256, x, block=b)
        for x in ("bfloat16", "float32")
        for b in KERNEL_BLOCKS
    ),
    *(QuantizeProblem("quantize", 256, 256, block=b, min_amax=1e-4) for b in KERNEL_BLOCKS),
    *(
        QuantizeProblem("quantize", 256, cols, x, fp8)
        for cols in (128, 131, 512, 1024, 1021)
        for x, fp8 in (("bfloat16", "float8_e4m3fn"), ("float16", "float8_e5m2"), ("float32", "float8_e5m2"))
    ),
    *(
        QuantizeProblem(
            "quantize", *shape, x, fp8, block, transposed=True, ue8m0=True, limited=block == (1, 128)
        )
        for x, fp8, shape in (
            ("bfloat16", "float8_e4m3fn", (256, 256)),
            ("float16", "float8_e5m2", (256, 256)),
            ("float32", "float8_e4m3fn", (256, 256)),
            ("bfloat16", "float8_e5m2", (129, 131)),
        )
        for block in KERNEL_BLOCKS[:2]
    ),
    *(
        QuantizeProblem(kind, 256, cols, x, transposed=transposed, limited=True, weighted=weighted)
        for kind, (cols, x), (transposed, weighted) in itertools.product(
            ("swiglu", "swiglu_grad"),
            ((512, "bfloat16"), (264, "bfloat16"), (262, "bfloat16"), (512, "float32")),
            ((True, True), (False, False)),
        )
    ),
    *(
        QuantizeProblem("quantize", 300, 256, x, transposed=True, blocks=5, indexed=indexed)
        for x in ("bfloat16", "float32")
        for indexed in (True, False)
    ),
    *(QuantizeProblem("quantize", 300, cols, indexed=True) for cols in (1024, 131)),
    *(
        QuantizeProblem(kind, 300, cols, transposed=True, weighted=True, blocks=5)
        for kind in ("swiglu", "swiglu_grad")
        for cols in (512, 264)
    ),
]


@functools.cache
def compiled() -> dict[str, Any]:
    pytest.importorskip("cuda.core")
    sources = {source.name: source for source in [*map(kernel_source, PROBLEMS), sum_source()]}
    return {one.name: one for one in compile_many(list(sources.values()), progress=False)}


@pytest.mark.any_version
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_ptxas_is_content(problem):
    source, shape = kernel_source(problem), cut_of(problem)
    report = compiled()[source.name].report
    assert report.problems() == ()
    assert report.registers * shape.threads * shape.blocks_per_sm <= 65_536
    assert (report.static_smem_bytes + source.shared_memory + 1024) * shape.blocks_per_sm <= 228 * 1024


def test_the_sum_of_parts_compiles():
    assert compiled()[sum_source().name].report.problems() == ()


def test_every_field_of_the_configuration_is_documented():
    documented = fields_of_concept("quantize/quantize_tile.cuh", "QuantizeConfig")
    assert all(len(words) > 8 for words in documented.values()), documented
    for problem in PROBLEMS:
        assert fields_of_struct(kernel_source(problem).text, "Config") == sorted(documented)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.walked], ids=str)
def test_shared_memory_is_what_the_kernel_lays_out(problem):
    source = kernel_source(problem)
    kind = "PairsShared" if problem.pairs else "StreamShared"
    check = f"static_assert(sizeof(jdg::{kind}<Config>) == {source.shared_memory});"
    text = source.text.replace('extern "C"', f'{check}\nextern "C"', 1)
    compile_many([type(source)(source.name, text)], progress=False)


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


M, K = 300, 392
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
PLANNED = [
    (quantize_op((1, 128), E4M3, "f32"), [struct((M, K), BF16)], (M, K), 10, 1),
    (quantize_op((1, 128), E4M3, "f32"), [struct((M, 2112), F32)], (M, 2112), 50, 1),
    (quantize_op((1, 128), E4M3, "f32"), [struct((M, 0), BF16)], (M, 0), 1, 1),
    (quantize_op((128, 1), E5M2, "ue8m0"), [struct((0, K), F32)], (0, K), 1, 1),
    (both_op(E4M3, "f32", True), [struct((M, K), BF16), struct((1,), I32)], (M, K), 12, 1),
    (weight_op(E4M3, "f32"), [struct((M, K), F32)], (M, K), 12, 1),
    (
        swiglu_op(E4M3, "f32", True, True, True),
        [struct((M, 2 * K), BF16), struct((M,), F32), struct((1,), I32)],
        (M, K),
        12,
        1,
    ),
    (
        swiglu_grad_op(E4M3, "f32", True, True, False),
        [struct((M, 2 * K), BF16), struct((M,), F32), struct((M, K), BF16)],
        (M, 2 * K),
        21,
        2,
    ),
    (
        swiglu_grad_op(E4M3, "f32", True, False, False),
        [struct((M, 512), BF16), struct((M, 256), BF16)],
        (M, 512),
        6,
        1,
    ),
    (
        swiglu_grad_op(E4M3, "f32", False, True, True),
        [struct((M, 0), BF16), struct((M,), F32), struct((M, 0), BF16), struct((1,), I32)],
        (M, 0),
        1,
        2,
    ),
]


@pytest.mark.parametrize(
    ("op", "types", "shape", "tiles", "steps"), PLANNED, ids=lambda x: getattr(x, "name", "")
)
def test_plans(op, types, shape, tiles, steps):
    """Operands and results in the op's order, a block per place, sizes and batch as scalars."""
    pytest.importorskip("cuda.core")
    results = jax.eval_shape(lambda *x: op(*x), *types)
    for batch in (1, 3):
        lead = () if batch == 1 else (batch,)
        given = [struct((*lead, *x.shape), x.dtype) for x in types]
        out = [struct((*lead, *x.shape), x.dtype) for x in results]
        plan = op.kernel.plan(given, out, batch=(True,) * len(given) if lead else None, chip=H200)
        first = plan.steps[0]
        assert isinstance(first, Launch)
        assert first.grid == (max(tiles * batch, 1) if tiles > 1 else 1, 1, 1)
        assert len(plan.steps) == steps
        buffers = [param for param in first.params if not hasattr(param, "value")]
        ordered = [f"operand {i}" for i in range(len(types))]
        ordered += [f"result {i}" for i in range(len(results) - (steps == 2))]
        assert [str(one) for one in buffers][: len(ordered)] == ordered
        scalars = [param.value for param in first.params if hasattr(param, "value")]
        assert tuple(scalars[:2]) == shape
        assert decode(encode(plan))["label"] == str(plan.label)


def test_unsupported_blocks_have_no_kernel():
    assert quantize_op((1, 64), E4M3, "f32").kernel is None
    assert all(quantize_op(block, E4M3, "f32").kernel is not None for block in KERNEL_BLOCKS)
    assert quantize(X, (1, 64)).scales.shape == (4, 4)
