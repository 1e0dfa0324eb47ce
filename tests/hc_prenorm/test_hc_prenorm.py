"""hc_prenorm_gemm: against float64, under every transformation, cut over devices; splits; errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import hc_prenorm_gemm
from jax_deepgemm.ops.hc_prenorm.family import HcPrenormConfig
from jax_deepgemm.ops.hc_prenorm.reference import split_bounds
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

M, N, K = 8, 4, 200


def operands(seed: int, m: int = M, n: int = N, k: int = K) -> list[jax.Array]:
    return [normal(seed, m, k), normal(seed + 100, n, k, dtype=jnp.float32)]


def in_float64(a: jax.Array, b: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    wide, columns = np.asarray(a).astype(np.float64), np.asarray(b, np.float64)
    return wide @ columns.T, (wide * wide).sum(axis=-1)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 24, 300), (0, 3, 8), (3, 260, 64), (2, 2, 0)])
def test_against_float64(m: int, n: int, k: int) -> None:
    a, b = operands(0, m, n, k)
    for got, want in zip(jax.jit(hc_prenorm_gemm)(a, b), in_float64(a, b), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("k", "num_splits", "bounds"),
    [
        (448, 3, [(0, 192), (192, 320), (320, 448)]),  # seven blocks: 3, 2, 2
        (130, 2, [(0, 128), (128, 130)]),
        (64, 3, [(0, 64), (64, 64), (64, 64)]),
    ],
)
def test_splits_are_parts_of_k(k: int, num_splits: int, bounds: list[tuple[int, int]]) -> None:
    assert split_bounds(k, num_splits) == bounds
    a, b = operands(0, k=k)
    d, squares = hc_prenorm_gemm(a, b, num_splits=num_splits)
    for i, (start, end) in enumerate(bounds):
        want = in_float64(a[:, start:end], b[:, start:end])
        np.testing.assert_allclose(d[i], want[0], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(squares[i], want[1], rtol=1e-5)


def test_a_row_s_nan_stays_in_its_row() -> None:
    a, b = operands(0)
    want = hc_prenorm_gemm(a, b)
    for got, clean in zip(hc_prenorm_gemm(a.at[3, 7].set(jnp.nan), b), want, strict=True):
        assert np.isnan(got[3]).all()
        np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(clean, 3, 0))


# Transformations --------------------------------------------------------------------------------------------


def of_d(out_sharding: Any) -> Any:
    return out_sharding[0] if type(out_sharding) is tuple else out_sharding


def whole(a: jax.Array, b: jax.Array, out_sharding: Any = None) -> Any:
    return hc_prenorm_gemm(a, b, out_sharding=of_d(out_sharding))


def split(a: jax.Array, b: jax.Array, out_sharding: Any = None) -> Any:
    return hc_prenorm_gemm(a, b, num_splits=3, out_sharding=of_d(out_sharding))


def plain(a: jax.Array, b: jax.Array) -> Any:
    wide = a.astype(jnp.float32)
    return jnp.dot(wide, b.T, precision="highest"), jnp.sum(wide * wide, axis=-1)


def joined(function: Any) -> Any:
    def one(*operands: jax.Array, **options: Any) -> jax.Array:
        d, squares = function(*operands, **options)
        return d * jax.lax.rsqrt(squares)[:, None]

    return one


def plain_split(a: jax.Array, b: jax.Array) -> Any:
    parts = [plain(a[:, start:end], b[:, start:end]) for start, end in split_bounds(K, 3)]
    return jax.tree.map(lambda *each: jnp.stack(each), *parts)


CASES = [
    OpCase(
        "whole",
        whole,
        operands,
        nests=(((0, None),), ((0, 0),), ((0, None), (None, 0))),
        plain=plain,
        wrt=(0, 1),
        grad_tolerance=1e-2,  # that of a is bfloat16
        shards=(
            Shard((P("x"), P()), (P("x"), P("x")), modes=("auto", "explicit", "shard_map")),
            Shard((P("x"), P("y")), (P("x"), P("x")), ("all-gather",), modes=("explicit",)),
            Shard((P("x", "y"), P()), (P("x"), P("x")), ("all-gather",)),
        ),
    ),
    OpCase(
        "normed",
        joined(whole),
        operands,
        plain=joined(plain),
        wrt=(0, 1),
        second=True,
        grad_tolerance=1e-2,
    ),
    OpCase(
        "splits",
        split,
        operands,
        nests=(((0, None),),),
        plain=plain_split,
        wrt=(0, 1),
        grad_tolerance=1e-2,
        shards=(Shard((P("x"), P()), (P(None, "x"), P(None, "x"))),),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Any) -> None:
    check()


def test_gradients_of_columns_are_float32() -> None:
    a, b = operands(0)

    def loss(function: Any, b: jax.Array) -> jax.Array:
        d, squares = function(a, b)
        return jnp.sum(jnp.sin(d)) + jnp.sum(squares)

    got, want = (jax.grad(functools.partial(loss, function))(b) for function in (hc_prenorm_gemm, plain))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"a": lambda a, b: a.astype(jnp.float32)},
            TypeError,
            "a is float32, need bfloat16. Convert it: a.as",
        ),
        ({"b": lambda a, b: b.astype(jnp.bfloat16)}, TypeError, "b is bfloat16, need float32"),
        ({"a": lambda a, b: [[1.0]]}, TypeError, "a is list, need bfloat16"),
        ({"a": lambda a, b: a[None]}, ValueError, r"a is \[1, 8, 200\], need \[m, k\]"),
        ({"b": lambda a, b: b.T}, ValueError, r"k differs \(200 and 4\). For b stored \[k, n\] give b.T"),
        ({"num_splits": lambda a, b: 0}, ValueError, "num_splits is 0, need a whole number from 1 to 1024"),
        ({"num_splits": lambda a, b: True}, ValueError, "num_splits is True"),
        ({"config": lambda a, b: 3}, TypeError, "config is 3, need a HcPrenormConfig or None"),
        ({"num_sms": lambda a, b: 0}, ValueError, "num_sms is 0"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    a, b = operands(0)
    given = {"a": a, "b": b} | {name: made(a, b) for name, made in change.items()}
    with pytest.raises(error, match=words):
        hc_prenorm_gemm(given.pop("a"), given.pop("b"), **given)


def test_a_configuration_that_breaks_a_rule() -> None:
    a, b = operands(0)
    export = jax.export.export(
        jax.jit(functools.partial(hc_prenorm_gemm, config=HcPrenormConfig(96, 1, 4, 1))), platforms=["cuda"]
    )
    with pytest.raises(ValueError, match="rows is 96, need one of"):
        export(a, b)
