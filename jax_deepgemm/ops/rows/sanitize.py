"""Calls for compute-sanitizer: rows of every width of vectors, of several pieces, with scales; their copies
and sums."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.dispatch.api import plan_copies
from jax_deepgemm.ops.quantize import QuantizedArray, quantize
from jax_deepgemm.ops.rows.api import move_rows, sum_rows, take_quantized

ROWS, WANTED = 33, 75


def _scales(x: QuantizedArray, index: jax.Array) -> jax.Array:
    """Of the kernel that takes values too, which are as many bytes."""
    taken = take_quantized(x, index)
    return jnp.concatenate([taken.values.astype(jnp.float32), taken.scales], axis=1)


def cases() -> Iterator[Case]:
    """Yields a case for each kind; every row of the index that does not exist is zero."""
    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.integers(-2, ROWS + 2, WANTED), jnp.int32)
    ids = jnp.asarray(rng.integers(-1, 4, (ROWS, 3)), jnp.int32)
    _, source, position = plan_copies(ids, 4, 40)  # more rows than copies
    for width in (2088, 2052, 70, 33):
        x = jnp.asarray(rng.standard_normal((ROWS, width)), jnp.bfloat16)
        yield Case(f"rows {width}", move_rows, (x, index))
        yield Case(f"copies {width}", lambda x: move_rows(x, source // 3, position), (x,))
        yield Case(f"sums {width}", sum_rows, (x, index.reshape(-1, 15 if width > 2052 else 3)))
        yield Case(f"rows quantised {width}", _scales, (quantize(x, (1, 128)), index))
