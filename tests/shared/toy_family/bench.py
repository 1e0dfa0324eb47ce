"""Rows of the benchmark."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import Row, Table
from tests.shared.toy_family.op import scale


def _draw(m: int, k: int) -> tuple[jax.Array, ...]:
    return jnp.ones((m, k)), jnp.arange(k, dtype=jnp.float32)


def _rows(small: bool) -> Iterator[Row]:
    for m, k in ((8, 16),) if small else ((4096, 4096), (4096, 7168)):
        fields = {"m": m, "k": k}
        yield Row(f"toy_scale m={m} k={k}", fields, scale, functools.partial(_draw, m, k), bytes=8 * m * k)


TABLES = {"toy_scale": Table("Columns scaled", ("m", "k"), _rows)}
