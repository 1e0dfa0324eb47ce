"""Norms of rows in jax.numpy, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.quantize import reference as quantization
from jax_deepgemm.ops.quantize.reference import exact_float32

E4M3 = np.dtype(jnp.float8_e4m3fn)
KINDS = ("layer", "rms")


def total(x: jax.Array, residual: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    """x [.., h] + residual [.., h] + bias [h], rounded once to the dtype of x."""
    if residual is None and bias is None:
        return x
    wide = x.astype(jnp.float32)
    for other in (residual, bias):
        wide = wide if other is None else wide + _wide(other, x.ndim)
    return wide.astype(x.dtype)


def normed(
    s: jax.Array, gamma: jax.Array | None = None, beta: jax.Array | None = None, *, kind: str, eps: float
) -> jax.Array:
    """The norm of each row of s [.., h], in its dtype."""
    wide = exact_float32(s)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + float(eps))
    y = y if gamma is None else y * _wide(gamma, s.ndim)
    y = y if beta is None else y + _wide(beta, s.ndim)
    return y.astype(s.dtype)


def _wide(x: jax.Array, ndim: int) -> jax.Array:
    """x in float32, dimensions of 1 in front."""
    return jnp.expand_dims(x.astype(jnp.float32), tuple(range(ndim - x.ndim)))


def quantized(y: jax.Array, scale_format: str) -> list[jax.Array]:
    """[values, scales] of the norm [r, h]: those of `quantize` with a scale for 128 of a row."""
    return quantization.quantize(y, block=(1, 128), dtype=E4M3, scale_format=scale_format)
