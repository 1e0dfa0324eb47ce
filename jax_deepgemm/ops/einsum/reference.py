"""einsum in plain jnp with float32 accumulation, its operands bfloat16, or FP8 with scales along k."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core import products
from jax_deepgemm.ops.einsum.form import Form, Term
from jax_deepgemm.ops.gemm.reference import dequantize_blocks, dequantize_rows, finish


def product(form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum of float32 arrays."""

    def places(term: Term, names: Term) -> tuple[int, ...]:
        return tuple(map(term.index, names))

    batch = tuple(name for name in form.d if name in form.a and name in form.b)
    shared = (places(form.a, batch), places(form.b, batch))
    summed = (places(form.a, form.summed), places(form.b, form.summed))
    out = products.dot_general(a, b, summed, shared)
    kept = [name for term in (form.a, form.b) for name in term if name in form.d and name not in batch]
    return jnp.transpose(out, places((*batch, *kept), form.d))


def bf16_einsum(
    a: jax.Array, b: jax.Array, c: jax.Array | None = None, *, form: Form, out_dtype: Any, **_: Any
) -> list[jax.Array]:
    """[C + the einsum]; products of two bfloat16 numbers are exact in float32, so only the sums round."""
    return [finish(product(form, a.astype(jnp.float32), b.astype(jnp.float32)), c, out_dtype)]


def fp8_einsum(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    c: jax.Array | None = None,
    *,
    form: Form,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[C + the einsum]; b has a scale for each row and 128 of k, or for 128x128 elements."""
    dequantize_b = dequantize_rows if sb.shape[-2] == b.shape[-2] else dequantize_blocks
    return [finish(product(form, dequantize_rows(a, sa), dequantize_b(b, sb)), c, out_dtype)]
