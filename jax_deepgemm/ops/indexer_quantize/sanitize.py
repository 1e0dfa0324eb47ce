"""Calls for compute-sanitizer: rows of every depth, with a tail, into arrays and caches of both formats."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.indexer_quantize.api import indexer_quantize

ROWS, PAGES, PAGE = 333, 9, 16


def _rows(x: jax.Array) -> jax.Array:
    found = indexer_quantize(x)
    return jnp.concatenate([found.values.astype(jnp.float32), found.scales], axis=1)


def _bytes(depth: int, x: jax.Array, slots: jax.Array) -> jax.Array:
    cache = jnp.zeros((PAGES, PAGE, depth + 4), jnp.uint8)
    return indexer_quantize(x, cache=cache, slots=slots, scale_format="ue8m0")


def _arrays(depth: int, x: jax.Array, slots: jax.Array) -> jax.Array:
    cache: Any = (jnp.zeros((PAGES, PAGE, depth), jnp.float8_e4m3fn), jnp.zeros((PAGES, PAGE)))
    values, scales = indexer_quantize(x, cache=cache, slots=slots, rotate=False)
    return jnp.concatenate([values.astype(jnp.float32), scales[..., None]], axis=2)


def cases() -> Iterator[Case]:
    """Yields each depth with each of the three results; slots outside of the cache are among them."""
    rng = np.random.default_rng(0)
    slots = jnp.asarray(rng.permutation(ROWS) - 7, jnp.int32)
    for depth, dtype in ((128, "bfloat16"), (64, "float32"), (32, "float16")):
        x = jnp.asarray(rng.standard_normal((ROWS, depth)), dtype)
        name = f"indexer quantize {depth} {dtype}"
        yield Case(name, _rows, (x,))
        yield Case(f"{name} to bytes", functools.partial(_bytes, depth), (x, slots))
        yield Case(f"{name} to arrays", functools.partial(_arrays, depth), (x, slots))
