"""Calls for compute-sanitizer: tails of rows, columns and k; splits that are added up, returned, empty."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.hc_prenorm.api import hc_prenorm_gemm
from jax_deepgemm.ops.hc_prenorm.family import HcPrenormConfig

FORMS = (
    ("one tile", 13, 24, 1024, None, None),
    ("odd sizes", 67, 7, 203, None, None),
    ("many columns", 130, 128, 640, None, None),
    ("128 rows", 300, 24, 1000, None, HcPrenormConfig(rows=128, groups=2, stages=4, splits=3)),
    ("256 rows", 300, 32, 1000, None, HcPrenormConfig(rows=256, groups=1, stages=2, splits=1)),
    ("4 groups", 70, 24, 3000, None, HcPrenormConfig(rows=64, groups=4, stages=8, splits=2)),
    ("splits returned", 65, 24, 700, 4, None),
    ("empty splits", 5, 24, 100, 7, None),
)
"""What it is, m, n, k, num_splits, config."""


def cases() -> Iterator[Case]:
    """Yields each form."""
    for what, m, n, k, num_splits, config in FORMS:
        rng = np.random.default_rng(0)
        a = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
        b = jnp.asarray(rng.integers(-8, 9, (n, k)) / 8, jnp.float32)  # numbers of TF32

        call: Any = functools.partial(hc_prenorm_gemm, num_splits=num_splits, config=config)

        def run(a: jax.Array, b: jax.Array, call: Any = call) -> jax.Array:
            return jnp.concatenate([one.reshape(-1) for one in call(a, b)])

        yield Case(f"hc_prenorm {what}", run, (a, b))
