"""Calls for compute-sanitizer: SwiGLU with quantising; each writes all results, one of them is compared."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.swiglu.api import swiglu_grad_quantize, swiglu_quantize

M, N = 520, 272  # tails in both dimensions
ROWS = 300  # that are valid


def cases() -> Iterator[Case]:
    """Yields widths of whole blocks of 128, of vectors only, and of neither."""
    rng, rows, weight = np.random.default_rng(0), jnp.int32(ROWS), jnp.ones((M,), jnp.float32)
    for width in (2 * 128, N, N + 2):
        h, dact = (
            jnp.asarray(rng.standard_normal((M, columns)), jnp.bfloat16) for columns in (width, width // 2)
        )
        yield Case(f"swiglu {width}", lambda h: swiglu_quantize(h, weight, rows)[3], (h,))
        yield Case(
            f"swiglu_grad {width}", lambda h, d: swiglu_grad_quantize(h, weight, d, rows)[4], (h, dact)
        )
