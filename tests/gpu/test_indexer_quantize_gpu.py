"""An indexer's rows in FP8 on a GPU: bit for bit the reference's, on the CPU.

Run: pytest -m gpu tests/gpu/test_indexer_quantize_gpu.py        (seconds)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.indexer import indexer_quantize
from jax_deepgemm.ops.indexer_quantize.problem import DEPTHS, DTYPES, RotateProblem

PAGES, PAGE, ROWS = 40, 64, 1001


def kernels() -> Iterator[Any]:
    for depth, dtype, powers in itertools.product(DEPTHS, DTYPES, (False, True)):
        for cache in ({}, {"pages": PAGES, "page": PAGE}):
            yield RotateProblem(ROWS, depth, dtype, powers=powers, **cache)


def drawn(depth: int, dtype: str) -> np.ndarray:
    """Rows of all magnitudes, zeros, and such as are no numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, depth)) * 10.0 ** rng.integers(-4, 4, (ROWS, 1))
    x[7], x[8, 3], x[9, 4] = 0, np.inf, np.nan
    return x.astype(jnp.dtype(dtype))


def bits(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def check(run: Any, *operands: Any) -> None:
    got = jax.jit(run)(*operands)
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.jit(run)(*operands)
    for one, other in zip(bits(got), bits(want), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.smoke
@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize(("depth", "dtype"), list(itertools.product(DEPTHS, DTYPES)))
def test_rows_and_caches(depth, dtype, scale_format):
    x, rng = drawn(depth, dtype), np.random.default_rng(1)
    check(lambda x: indexer_quantize(x, scale_format=scale_format), x)
    slots = rng.permutation(2 * ROWS)[:ROWS].astype(np.int32)
    slots = np.where(rng.random(ROWS) < 0.2, rng.choice([-1, PAGES * PAGE, -(2**31), 2**31 - 1], ROWS), slots)
    slots = slots.astype(np.int32)

    def write(x: Any, slots: Any, cache: Any) -> Any:
        return indexer_quantize(x, cache=cache, slots=slots, scale_format=scale_format)

    cache = rng.integers(0, 256, (PAGES, PAGE, depth + 4), np.uint8)
    check(write, x, slots, cache)
    values = rng.standard_normal((PAGES, PAGE, depth)).astype(jnp.float8_e4m3fn)
    check(write, x, slots, (values, rng.standard_normal((PAGES, PAGE)).astype(np.float32)))


def test_a_donated_cache_is_updated_in_place():
    x, cache = jnp.asarray(drawn(128, "bfloat16")), jnp.zeros((PAGES, PAGE, 132), jnp.uint8)
    slots = jnp.arange(ROWS, dtype=jnp.int32)
    write = jax.jit(lambda x, slots, cache: indexer_quantize(x, cache=cache, slots=slots), donate_argnums=2)
    compiled = write.lower(x, slots, cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
    first = write(x, slots, cache)
    again = np.asarray(first)
    for _ in range(20):
        first = write(x, slots, first)
        np.testing.assert_array_equal(first, again)
