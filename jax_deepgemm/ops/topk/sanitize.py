"""Calls for compute-sanitizer: rows that a block holds, rows with a sample, rows of a cluster; rows whose
sample misleads, and those that crowd bins."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.topk.api import topk

FORMS = (
    (300, 600, 50, "float32"),
    (300, 3001, 2048, "bfloat16"),
    (5, 20_001, 2048, "float32"),
    (270, 9000, 33, "float16"),
    (1, 300_001, 2048, "float32"),
)
"""Rows, columns, k, dtype."""


def cases() -> Iterator[Case]:
    """Yields each form without windows and with values, and with windows by index."""
    for rows, columns, k, dtype in FORMS:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((rows, columns)).astype(np.float32)
        x[::3] = np.sort(x[::3])
        x[1::3, : columns // 2] = 0.5
        x[2::3] = 1 + 1e-3 * x[2::3]
        x[2::3, ::80] = 6e4
        start, end = np.sort(rng.integers(-5, columns + 5, (2, rows)), axis=0).astype(np.int32)
        given = (jnp.asarray(x, dtype), jnp.asarray(start), jnp.asarray(end))

        def plain(x: jax.Array, start: jax.Array, end: jax.Array, k: int = k) -> jax.Array:
            found, indices = topk(x, k, values=True)
            return jnp.concatenate([jnp.where(indices < 0, 0, found), indices.astype(x.dtype)])

        def windows(x: jax.Array, start: jax.Array, end: jax.Array, k: int = k) -> jax.Array:
            return topk(x, k, start=start, end=end, order="index")

        yield Case(f"topk {k} of {rows}x{columns} {dtype}", plain, given)
        yield Case(f"topk {k} of {rows}x{columns} {dtype} windows", windows, given)
