"""The largest numbers of rows: against NumPy, under every transformation, cut over devices; errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import topk
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.topk import sm90
from jax_deepgemm.ops.topk.family import FAMILY
from jax_deepgemm.ops.topk.problem import DTYPES, MOST_COLUMNS, TopkProblem
from tests.shared import op_checks, topk_oracle
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

M, N, K = 8, 64, 5


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(jnp.dtype(dtype))


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (7, 9), (300, 1), (300, 64), (2000, 2048)])
def test_hard_rows(dtype, n, k):
    x = cast(topk_oracle.rows(n), dtype)
    start, end = topk_oracle.windows(len(x), n)
    for windows in ((None, None), (start, end), (None, end)):
        for order in ("value", "index"):
            run = functools.partial(topk, k=k, order=order, values=True)
            found, indices = jax.jit(run)(x, start=windows[0], end=windows[1])
            want = topk_oracle.topk(x, k, *windows, by_index=order == "index")
            np.testing.assert_array_equal(indices, want)
            bits = f"uint{8 * x.dtype.itemsize}"
            np.testing.assert_array_equal(
                np.asarray(found).view(bits), topk_oracle.values(x, want).view(bits)
            )
    np.testing.assert_array_equal(jax.jit(functools.partial(topk, k=k))(x), topk_oracle.topk(x, k))


def test_as_jax_where_there_are_enough_numbers():
    x = normal(0, 5, 100, dtype=jnp.float32)
    for got, want in zip(topk(x, 7, values=True), jax.lax.top_k(x, 7), strict=True):
        np.testing.assert_array_equal(got, want)


# Transformations --------------------------------------------------------------------------------------------


def both(x: jax.Array, out_sharding: Any = None) -> tuple[jax.Array, jax.Array]:
    return topk(x, K, values=True, out_sharding=one_of(out_sharding))


def one_of(out_sharding: Any) -> Any:
    return out_sharding[0] if type(out_sharding) is tuple else out_sharding


def indices_of(order: str) -> Any:
    def call(x: jax.Array, start: jax.Array, end: jax.Array, out_sharding: Any = None) -> jax.Array:
        return topk(x, K, start=start, end=end, order=order, out_sharding=out_sharding)

    return call


def values_of(x: jax.Array, out_sharding: Any = None) -> jax.Array:
    return topk(x, K, values=True, out_sharding=out_sharding)[0]


def numbers(seed: int) -> list[jax.Array]:
    return [jnp.round(4 * normal(seed, M, N, dtype=jnp.float32)) / 4]  # with ties


def with_windows(seed: int) -> list[jax.Array]:
    return [*numbers(seed), *map(jnp.asarray, topk_oracle.windows(M, N, seed))]


GATHERED = ("all-gather",) * 2
CASES = [
    OpCase(
        "both",
        both,
        numbers,
        nests=(((0,),), ((0,), (1,))),
        shards=(
            Shard((P("x"),), (P("x"), P("x")), modes=("auto", "explicit", "shard_map")),
            Shard((P(None, "y"),), (P(), P()), GATHERED),
            Shard((P("x", "y"),), (P("x"), P("x")), GATHERED),
            Shard((P(None, ("x", "y")),), (P(), P()), GATHERED),
            Shard((P(None, "y"),), (P("y"), P("y")), GATHERED),
        ),
    ),
    *(
        OpCase(
            f"windows-{order}",
            indices_of(order),
            with_windows,
            nests=(((0, 0, 0),), ((0, None, None),), ((None, 0, None),)),
            shards=(
                Shard((P("x"), P("x"), P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
                Shard((P("x", "y"), P("x"), P("x")), P("x"), GATHERED),
            ),
        )
        for order in ("value", "index")
    ),
    OpCase(
        "values",
        values_of,
        lambda seed: [normal(seed, M, N, dtype=jnp.float32)],
        nests=(((0,),),),
        plain=lambda x: jax.lax.top_k(x, K)[0],
        wrt=(0,),
        second=True,
        shards=(Shard((P("x"),), P("x")), Shard((P("x", "y"),), P("x"), GATHERED[:1])),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.parametrize("carried", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_of_rows_whose_columns_are_cut(carried):
    mesh = op_checks.make_mesh("auto")
    cuts = [P(None, None, "y") if carried[0] == 0 else P(None, "y"), P(), P()]
    stacked = [with_windows(seed) for seed in range(2)]
    given = [
        jnp.stack([one[i] for one in stacked]) if axis == 0 else stacked[0][i]
        for i, axis in enumerate(carried)
    ]
    placed = [
        jax.device_put(x, jax.sharding.NamedSharding(mesh, cut)) for x, cut in zip(given, cuts, strict=True)
    ]
    for order in ("value", "index"):
        run = jax.jit(jax.vmap(indices_of(order), carried))
        np.testing.assert_array_equal(run(*placed), run(*given))


def test_a_result_asked_in_pieces_of_k():
    mesh = op_checks.make_mesh("auto")
    [x] = numbers(0)
    for spec in (P("x"), P("x", "y")):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        for cut in (P("x", "y"), P(None, "y")):
            k = 8
            run = jax.jit(functools.partial(topk, k=k), out_shardings=jax.sharding.NamedSharding(mesh, cut))
            np.testing.assert_array_equal(run(placed), topk(x, k))


def test_the_gradient_goes_to_what_was_chosen():
    x = jnp.array([[1.0, 3.0, 2.0], [jnp.nan, -jnp.inf, 5.0]])
    gradient = jax.grad(lambda x: jnp.where(jnp.isfinite(v := topk(x, 2, values=True)[0]), v, 0).sum())(x)
    assert gradient.tolist() == [[0, 1, 1], [0, 0, 1]]


# The kernel's place -----------------------------------------------------------------------------------------


@pytest.mark.any_version
def test_it_is_one_launch():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    x = jax.ShapeDtypeStruct((64, 65536), jnp.bfloat16)
    run = jax.jit(functools.partial(topk, k=2048, values=True))
    text = run.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_deepgemm_launch(") == 1
    assert "sort" not in text


PROBLEMS = [
    TopkProblem(*shape, dtype=DTYPES[i % 3], windows=i % 2 == 0, values=i % 4 < 2, by_index=i % 5 == 0)
    for i, shape in enumerate(
        [(1, 1, 1), (8192, 65536, 2048), (64, 65536, 2048), (1, MOST_COLUMNS, 2048), (4096, 512, 8),
         (300, 4096, 100), (132, 9000, 2000), (1, 1000, 1)]
    )
]  # fmt: skip


@pytest.mark.any_version
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_plans_fit_the_chip(problem):
    pytest.importorskip("cuda.core")
    [launch] = FAMILY.plan(problem, H200, {}).steps
    cut = sm90.cut_of(problem, H200.num_sms)
    assert launch.grid[0] == problem.rows * cut.pieces
    assert launch.cluster == cut.pieces <= 16
    assert launch.shared_memory * cut.resident <= 228 * 1024 - 1024 * cut.resident
    assert cut.sample <= 2 * cut.capacity or problem.columns <= cut.capacity
    assert not launch.kernel.report.problems()
    assert launch.kernel.report.registers * cut.threads * cut.resident <= 65536
    assert min(problem.k, problem.columns) <= cut.capacity


def test_beyond_the_kernel(caplog):
    """XLA sorts, and says so once."""
    x = jax.ShapeDtypeStruct((2, 8192), jnp.float32)
    with caplog.at_level("INFO"):
        text = jax.jit(functools.partial(topk, k=4096)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "jax_deepgemm_launch" not in text
    assert "k is 4096, the kernel takes 2048" in caplog.text


def test_export_with_a_symbolic_number_of_rows():
    (rows,) = export.symbolic_shape("m")
    types = jax.ShapeDtypeStruct((rows, 9), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def run(x: jax.Array, end: jax.Array) -> jax.Array:
        return topk(x, 4, end=end)

    exported = export.export(jax.jit(run), platforms=["cpu"], disabled_checks=jdg.export_checks)(*types)
    x, end = normal(0, 3, 9, dtype=jnp.float32), jnp.array([9, 2, 0], jnp.int32)
    np.testing.assert_array_equal(exported.call(x, end), topk_oracle.topk(x, 4, end=end))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing_to_choose_from(shape):
    found, indices = jax.jit(functools.partial(topk, k=2, values=True))(jnp.zeros(shape))
    assert indices.shape == found.shape == (shape[0], 2)
    assert np.all(np.asarray(indices) == -1)
    assert np.all(np.asarray(found) == -np.inf)


# Errors -----------------------------------------------------------------------------------------------------

X = jnp.zeros((4, 8))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: topk(X.astype(jnp.int32), 2), TypeError, "x is int32, need float32, bfloat16, float16"),
        (lambda: topk([1.0], 2), TypeError, "x is list"),
        (lambda: topk(X[0], 2), ValueError, r"x is \[8\], need \[m, n\]. Merge leading dimensions"),
        (lambda: topk(X, 0), ValueError, "k is 0, need a whole number, at least 1"),
        (lambda: topk(X, 2.0), ValueError, "k is 2.0"),
        (lambda: topk(X, 2, order="up"), ValueError, "order is 'up', need 'value' or 'index'"),
        (lambda: topk(X, 2, start=jnp.zeros(3, jnp.int32)), ValueError, r"start is \[3\] and x is \[4, 8\]"),
        (lambda: topk(X, 2, end=jnp.zeros(4)), TypeError, "end is float32, need integers"),
        (lambda: topk(X, 2, out_sharding="x"), TypeError, "topk: out_sharding is 'x'"),
    ],
)  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_advice_of_errors():
    assert topk(X.astype(jnp.int32).astype(jnp.float32), 2).shape == (4, 2)
    assert topk(X.reshape(2, 2, 8).reshape(-1, 8), 2).shape == (4, 2)
    assert topk(X, 2, end=jnp.full(4, 3.0).astype(jnp.int32)).shape == (4, 2)
