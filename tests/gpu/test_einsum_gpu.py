"""Einsums on an H200: every place of the batch, runs of k, tails, every kind of configuration, against
float64; NaN of one head reaches no other; equal bits.

Run: pytest -m gpu tests/gpu/test_einsum_gpu.py        (seconds, besides compiling)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.tools.explain import problems
from tests.shared.choosing import ranked
from tests.shared.einsum_cases import PRODUCTS, draw, error, exact, shapes
from tests.shared.gpu_programs import C_ELSEWHERE, program, with_c_elsewhere

BF16, F32 = jnp.bfloat16, jnp.float32
UP, SUM = "bhr,hdr->bhd", "bmk,bnk->mn"
LIMIT = {"bfloat16": 2**-8, "float32": 5e-5}
LETTERS = "abcdghkmnrvxy"
SIZES = (
    dict(zip(LETTERS, (5, 3, 24, 136, 2, 3, 72, 72, 200, 136, 3, 40, 56), strict=True)),
    dict(zip(LETTERS, (3, 131, 7, 133, 2, 3, 65, 130, 67, 99, 2, 13, 11), strict=True)),  # nothing fits
)
LARGE = {"b": 500, "h": 5, "d": 264, "r": 328}
RUNS = {"b": 21, "m": 130, "n": 264, "k": 136}
STREAM = {"b": 1100, "h": 96, "d": 264, "r": 264}  # more than L2 holds: the tiles of all heads come together


def structs(expr: str, sizes: dict[str, int], *, fp8: bool = False, add: str = "") -> list[Any]:
    a, b, d = shapes(expr, sizes)
    operands: list[Any] = [jax.ShapeDtypeStruct(x, BF16) for x in (a, b)]
    if fp8:
        blocks = ((1, 128), (128, 128))
        operands = [
            jax.eval_shape(functools.partial(jdg.quantize, block=one), x)
            for one, x in zip(blocks, operands, strict=True)
        ]
    return [*operands, *([jax.ShapeDtypeStruct(d, add)] if add else [])]


def problem(expr: str, sizes: dict[str, int], out: str = "bfloat16", **options: Any) -> GemmProblem:
    function = jdg.fp8_einsum if options.get("fp8") else jdg.bf16_einsum
    operands = structs(expr, sizes, **options)
    [(found, _)] = problems(functools.partial(function, expr, out_dtype=out), *operands)
    assert isinstance(found, GemmProblem)
    return found


def kernels() -> Iterator[GemmProblem]:
    for expr in PRODUCTS:
        for sizes in SIZES:
            yield problem(expr, sizes)
            yield problem(expr, sizes, "float32", add="float32")
    yield from (problem(UP, sizes, fp8=True) for sizes in (LARGE, LARGE | {"b": 5}))
    yield problem(UP, STREAM, "float32")


@pytest.mark.smoke
@pytest.mark.parametrize("expr", PRODUCTS)
def test_every_place_of_the_batch(expr):
    for seed, sizes in enumerate(SIZES):
        a, b, c = draw(expr, sizes, seed)
        got = program(functools.partial(jdg.bf16_einsum, expr))(a, b)
        assert error(got, exact(expr, a, b)) < LIMIT["bfloat16"]
        wide = functools.partial(jdg.bf16_einsum, expr, out_dtype=F32)
        assert error(program(wide)(a, b, c.astype(F32)), exact(expr, a, b, c)) < LIMIT["float32"]


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("columns", [264, 262, 261])
def test_every_store(columns, out):
    """D and C with a batch between rows and columns: by TMA, by pairs, one by one; few rows and many."""
    for rows in (5, 300):
        a, b, c = draw(UP, LARGE | {"b": rows, "d": columns})
        c = c.astype(out)
        for addend in (None, c):
            got = program(functools.partial(jdg.bf16_einsum, UP, out_dtype=out))(a, b, addend)
            assert error(got, exact(UP, a, b, addend)) < LIMIT[out]


@pytest.mark.parametrize("expr", [UP, SUM, "bkm,nkb->mn", "bhd,bhr->hdr"])
def test_configurations(expr):
    """One of each kind, on few SMs, so that each computes several tiles."""
    sizes = LARGE | RUNS | {"b": 33}
    a, b, _ = draw(expr, sizes)
    want = exact(expr, a, b)
    chosen: dict[Any, Any] = {}
    for config, _cost in ranked(problem(expr, sizes), H200):
        kind = (
            config.rows,
            config.across,
            config.swap_ab,
            config.split_k,
            config.ping_pong,
            config.blocks_per_sm,
        )
        chosen.setdefault(kind, config)
    assert len(chosen) > 5
    for config in chosen.values():
        got = program(functools.partial(jdg.bf16_einsum, expr, config=config, num_sms=8))(a, b)
        assert error(got, want) < LIMIT["bfloat16"], config


@pytest.mark.smoke
def test_rows_that_stream_by():
    assert problem(UP, STREAM).batches_together
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, x, BF16) for key, x in zip(keys, shapes(UP, STREAM), strict=False))
    got = program(functools.partial(jdg.bf16_einsum, UP, out_dtype=F32))(a, b)
    want = program(lambda a, b: jnp.einsum(UP, a, b, preferred_element_type=F32))(a, b)
    assert error(got, np.asarray(want).astype(np.float64)) < LIMIT["float32"]


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [5, 500])
@pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
def test_fp8(rows, block):
    a, b, c = draw(UP, LARGE | {"b": rows})
    a, b = jdg.quantize(a), jdg.quantize(b, block)
    numbers = [np.asarray(jdg.dequantize(x)) for x in (a, b)]
    for addend in (None, c):
        got = program(functools.partial(jdg.fp8_einsum, UP))(a, b, addend)
        assert error(got, exact(UP, *numbers, addend)) < LIMIT["bfloat16"]
    turned = program(functools.partial(jdg.fp8_einsum, "hdr,bhr->bhd"))(b, a)
    np.testing.assert_array_equal(turned, program(functools.partial(jdg.fp8_einsum, UP))(a, b))


@pytest.mark.parametrize("rows", [5, 300])
def test_nan_stays_in_its_head_and_row(rows):
    a, b, _ = draw(UP, LARGE | {"b": rows})
    run = program(functools.partial(jdg.bf16_einsum, UP))
    clean = np.asarray(run(a, b))
    got = np.asarray(run(a.at[:, 1].set(jnp.nan).at[3, 4, 0].set(jnp.nan), b.at[1].set(jnp.nan))).copy()
    assert np.isnan(got[:, 1].astype(np.float32)).all()
    assert np.isnan(got[3, 4].astype(np.float32)).all()
    got[:, 1], got[3, 4] = clean[:, 1], clean[3, 4]
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("where", C_ELSEWHERE)
@pytest.mark.parametrize("expr", [UP, SUM])
def test_c_that_lives_on_is_added_and_not_changed(expr, where):
    a, b, c = draw(expr, LARGE | RUNS | {"b": 37})
    c = c.astype(F32)
    add = lambda c, a, b: jdg.bf16_einsum(expr, a, b, c, out_dtype=F32)  # noqa: E731
    assert error(with_c_elsewhere(where, add, c, a, b), exact(expr, a, b, c)) < LIMIT["float32"]


@pytest.mark.smoke
@pytest.mark.parametrize("expr", [UP, SUM])
def test_runs_are_equal(expr):
    """Also where a sum is divided among the blocks of a cluster."""
    sizes = {"b": 129, "m": 128, "n": 384, "k": 128, "h": 9, "d": 128, "r": 512}
    assert ranked(problem(SUM, sizes), H200)[0][0].split_k > 1
    a, b, _ = draw(expr, sizes)
    run = program(functools.partial(jdg.bf16_einsum, expr, out_dtype=F32))
    first = np.asarray(run(a, b))
    assert error(first, exact(expr, a, b)) < LIMIT["float32"]
    for _ in range(20):
        np.testing.assert_array_equal(run(a, b), first)


@pytest.mark.parametrize("expr", [UP, "bhd,hdr->bhr", SUM])
def test_gradients_are_those_of_the_reference(expr):
    sizes = {"b": 70, "h": 3, "d": 72, "r": 104, "m": 40, "n": 72, "k": 104}
    a, b, _ = draw(expr, sizes)

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jdg.bf16_einsum(expr, a, b, out_dtype=F32) / 16))

    there = jax.jit(jax.grad(loss, (0, 1)))(*jax.device_put((a, b), jax.devices("cpu")[0]))
    for one, other in zip(program(jax.grad(loss, (0, 1)))(a, b), there, strict=True):
        assert error(one, np.asarray(other).astype(np.float64)) < 2**-7


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)], ids=str)
@pytest.mark.parametrize("expr", [UP, "mk,nk->mn", SUM])
def test_mapped(expr, axes):
    sizes = {"b": 9, "h": 3, "d": 72, "r": 104, "m": 40, "n": 72, "k": 104}
    each = [draw(expr, sizes, seed) for seed in range(3)]
    operands = [
        each[0][i] if axis is None else jnp.stack([one[i] for one in each]) for i, axis in enumerate(axes)
    ]
    got = program(jax.vmap(functools.partial(jdg.bf16_einsum, expr), axes))(*operands)
    for z in range(3):
        a, b = (each[0 if axis is None else z][i] for i, axis in enumerate(axes))
        assert error(got[z], exact(expr, a, b)) < LIMIT["bfloat16"]
