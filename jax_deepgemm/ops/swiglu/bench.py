"""Rows of the benchmark: SwiGLU with the quantising of its result and of its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import Row
from jax_deepgemm.ops.quantize.bench import QUANTISING, Kinds, memory_rows
from jax_deepgemm.ops.swiglu.api import swiglu, swiglu_grad_quantize, swiglu_quantize


def _gradients(h: jax.Array, weight: jax.Array, dact: jax.Array) -> tuple[jax.Array, ...]:
    gradients: tuple[jax.Array, ...] = jax.vjp(swiglu, h, weight)[1](dact)
    return gradients


KINDS: Kinds = {
    "swiglu": (4 + 2, swiglu),
    "swiglu_grad": (6 + 4, _gradients),
    "swiglu_quantize": (4 + 2, swiglu_quantize),
    "swiglu_grad_quantize": (6 + 4, swiglu_grad_quantize),
}
"""Of act [m, n]: what is read and written of each element, in bytes; function."""


def _draw(kind: str, m: int, n: int) -> tuple[jax.Array, ...]:
    """h, weight, and dact for the gradient, standard normal in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    h, weight = jax.random.normal(keys[0], (m, 2 * n), jnp.bfloat16), jax.random.uniform(keys[1], (m,))
    if kind in ("swiglu", "swiglu_quantize"):
        return h, weight
    return h, weight, jax.random.normal(keys[2], (m, n), jnp.bfloat16)


def _rows(small: bool) -> Iterator[Row]:
    kinds = {"swiglu_quantize": KINDS["swiglu_quantize"]} if small else KINDS
    return memory_rows(kinds, _draw, small)


TABLES = {"quantize": replace(QUANTISING, rows=_rows)}
