"""Rows of tokens copied, and quantised, to where they are wanted: bit for bit rows that are taken by the
index, and quantised one by one.

Run: pytest -m gpu tests/gpu/test_copies_gpu.py        (seconds)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.moe.dispatch import plan_capacity, plan_dispatch
from jax_deepgemm.ops.quantize.groups import quantize_rows
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.rows.api import move_rows
from jax_deepgemm.ops.rows.problem import RowsProblem
from tests.gpu.test_dispatch_gpu import taken
from tests.gpu.test_fused_gpu import assert_bits, draw, on_both, with_specials

# Tokens, slots, experts, capacity (0: as many rows as copies).
PLANS = ((4096, 8, 32, 0), (300, 3, 5, 0), (300, 3, 5, 200), (7, 40, 64, 9), (1, 1, 1, 0), (1, 8, 256, 1))
WIDTHS = (7168, 576, 131)


def plan(tokens: int, slots: int, experts: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Every eighth copy is dropped."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, experts, (tokens, slots)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.125] = -1
    with jax.default_device(jax.devices("cpu")[0]):
        made = plan_capacity(ids, experts, capacity) if capacity else plan_dispatch(ids, experts)
        return np.asarray(made.token), np.asarray(made.position)


def kernels() -> Iterator[Any]:
    for (tokens, slots, experts, capacity), width in itertools.product(PLANS, WIDTHS):
        rows = capacity * experts or tokens * slots
        for size in (1, 2, 4):
            yield RowsProblem(rows, tokens, size * width, copies=slots)
        for x in ("bfloat16", "float32"):
            yield QuantizeProblem("quantize", rows, width, x, indexed=True, copied=tokens)
    yield QuantizeProblem("quantize", 900, 576, indexed=True, copied=300, ue8m0=True)
    yield QuantizeProblem("quantize", 900, 576, fp8="float8_e5m2", indexed=True, copied=300)


@pytest.mark.smoke
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_copies(sizes, width):
    index, position = plan(*sizes)
    for dtype in ("bfloat16", "float32", "int8"):
        x = draw((sizes[0], width), "float32").astype(jnp.dtype(dtype))
        got = np.asarray(jax.jit(move_rows)(x, index, position))
        want = taken(x, index)
        np.testing.assert_array_equal(got.view(want.dtype), want)


@pytest.mark.smoke
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_quantised_copies(sizes, width):
    index, position = plan(*sizes)
    for x_dtype in ("bfloat16", "float32"):
        x = with_specials(draw((sizes[0], width), x_dtype))
        assert_bits(*on_both(lambda *args: jax.tree.leaves(quantize_rows(*args)), x, index, position))


@pytest.mark.parametrize("form", [{"scale_format": "ue8m0"}, {"dtype": "float8_e5m2"}], ids=str)
def test_other_formats(form):
    function = functools.partial(quantize_rows, **form)
    x = with_specials(draw((300, 576)))
    assert_bits(*on_both(lambda *args: jax.tree.leaves(function(*args)), x, *plan(*PLANS[1])))


def test_equal_bits_between_buffers_full_of_nan():
    """Rows that are copies of none are zeros every time, whatever the buffer held."""
    x, (index, position) = draw((4096, 2048)), plan(4096, 8, 32, 0)

    @jax.jit
    def step(x: Any) -> Any:
        q = quantize_rows(x, index, position)
        return move_rows(x, index, position).view(jnp.uint16), q.values.view(jnp.uint8), q.scales

    first = [np.asarray(part) for part in step(x)]
    assert not first[0][index == 4096].any()
    assert not first[1][index == 4096].any()
    for _ in range(20):
        jax.block_until_ready([jnp.full((1 << 24,), jnp.nan) for _ in range(4)])
        for got, want in zip(step(x), first, strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)


def test_the_gradient_of_copies():
    x, (index, position) = draw((300, 260), "float32"), plan(300, 3, 5, 0)
    dy = draw((900, 260), "float32", 1)
    (got,) = jax.jit(lambda x, dy: jax.vjp(lambda x: move_rows(x, index, position), x)[1](dy))(x, dy)
    want = np.zeros((300, 260), np.float32)
    for slot in range(3):
        want += np.where(position[:, slot, None] < 900, dy[np.minimum(position[:, slot], 899)], 0)
    np.testing.assert_array_equal(got, want)
