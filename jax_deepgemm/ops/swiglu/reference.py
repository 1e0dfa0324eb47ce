"""SwiGLU and its gradient in jax.numpy, in float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.quantize.reference import exact_float32, zero_rows


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(x) and its slope."""
    sigmoid = jax.nn.sigmoid(x)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


def act(h: jax.Array, weight: jax.Array | None, rows: jax.Array | None) -> jax.Array:
    """silu(gate) * up * weight of h [.., m, 2 i], in float32; zeros from row rows [.., 1] on."""
    gate, up = jnp.split(exact_float32(h), 2, axis=-1)
    product = _silu(gate)[0] * up
    return zero_rows(product if weight is None else product * weight[..., None], rows)


def grad(
    h: jax.Array, weight: jax.Array | None, dact: jax.Array, rows: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The gradients of h [.., m, 2 i] and of weight [.., m], in float32; zeros from row rows [.., 1] on."""
    gate, up = jnp.split(exact_float32(h), 2, axis=-1)
    given = exact_float32(dact)
    value, slope = _silu(gate)
    scaled = given if weight is None else given * weight[..., None]
    dh = jnp.concatenate([scaled * (up * slope), scaled * value], axis=-1)
    dweight = jnp.sum(zero_rows(given * value * up, rows), axis=-1)
    return zero_rows(dh, rows), dweight
