"""Calls for compute-sanitizer: matrices of some sizes, with a tail of the last block, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.sinkhorn.op import sinkhorn_op

FORMS = ((67, 4, 20), (1, 1, 1), (130, 8, 32), (65, 3, 2))
"""Matrices, their rows, iterations."""


def cases() -> Iterator[Case]:
    """Yields each form, and its gradient."""
    for count, n, iterations in FORMS:
        rng = np.random.default_rng(n)
        logits, by = (jnp.asarray(rng.standard_normal((count, n, n)), jnp.float32) for _ in range(2))
        form = {"iterations": iterations, "eps": 1e-6}

        def value(logits: jax.Array, by: jax.Array, form: dict[str, float] = form) -> jax.Array:
            return sinkhorn_op("sinkhorn", True)(logits, **form)[0]

        def gradient(logits: jax.Array, by: jax.Array, form: dict[str, float] = form) -> jax.Array:
            return sinkhorn_op("sinkhorn_gradient", True)(logits, by, **form)[0]

        yield Case(f"sinkhorn {count}x{n}", value, (logits, by))
        yield Case(f"sinkhorn gradient {count}x{n}", gradient, (logits, by))
