"""Calls for compute-sanitizer: every kind of quantising kernel; each writes all results, one is compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.fused import quantize_both, quantize_weight

M, N = 520, 272  # tails in both dimensions
ROWS = 300  # that are valid, where a kernel is told


def cases() -> Iterator[Case]:
    """Yields every block of scales, and the kernels with two results."""
    rng, rows = np.random.default_rng(0), jnp.int32(ROWS)
    for shape in ((M, N), (M + 1, N + 3)):
        x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for block in ((1, 128), (128, 128), (128, 1)):
            yield Case(f"quantize {block} {x.shape}", functools.partial(_values, block), (x,))
        yield Case(f"quantize_both {x.shape}", lambda x: quantize_both(x, rows)[2], (x,))
        yield Case(f"quantize_weight {x.shape}", lambda x: quantize_weight(x)[2], (x,))


def _values(block: tuple[int, int], x: jax.Array) -> jax.Array:
    return quantize(x, block).values
