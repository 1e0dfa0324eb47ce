"""Calls for compute-sanitizer: rows of one warp and of several, with tails, every operand and result."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.norm.op import norm_rows

ROWS = 77


def _run(form: dict[str, Any], x: Any, residual: Any, *vectors: Any) -> jax.Array:
    found = norm_rows(x, residual, vectors, eps=1e-5, **form)
    return jnp.concatenate([one.astype(jnp.float32).reshape(-1) for one in found])


def cases() -> Iterator[Case]:
    """Yields widths that end inside a tile, a chunk, a warp, and types and forms of each kind of kernel."""
    rng = np.random.default_rng(0)
    all_of_it = {"kind": "layer", "scales": "f32", "summed": True}
    forms = (
        (7168, "bfloat16", "bfloat16", all_of_it),
        (4104, "float16", "float32", all_of_it),
        (1027, "float32", "float32", all_of_it),
        (200, "bfloat16", "float32", all_of_it),
        (5120, "bfloat16", "bfloat16", {"kind": "rms", "scales": "ue8m0", "normed": False}),
        (16384, "float32", "float32", {"kind": "rms", "summed": True}),
    )
    for cols, dtype, vectors, form in forms:
        rows = [jnp.asarray(rng.standard_normal((ROWS, cols)), dtype) for _ in range(2)]
        given = [jnp.asarray(rng.standard_normal(cols), vectors) for _ in range(3)]
        yield Case(f"norm {cols} {dtype} {form['kind']}", functools.partial(_run, form), (*rows, *given))
