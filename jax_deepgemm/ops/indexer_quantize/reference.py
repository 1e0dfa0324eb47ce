"""Rotation and quantisation of rows in jax.numpy, in float32: the sums of the kernel, in its order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.quantize.reference import exact_float32, quantize_float32

E4M3 = np.dtype(jnp.float8_e4m3fn)


def hadamard(x: jax.Array) -> jax.Array:
    """x [.., d] times the orthonormal Hadamard matrix of d, a power of two, in float32."""
    *lead, depth = x.shape
    v = exact_float32(x)
    step = 1
    while step < depth:
        pairs = v.reshape(*lead, depth // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v = jnp.stack([a + b, a - b], axis=-2).reshape(*lead, depth)
        step *= 2
    return v * np.float32(depth**-0.5)


def quantize(x: jax.Array, *, rotate: bool, powers: bool) -> list[jax.Array]:
    """Values [.., m, d] and scales [.., m, 1] of x [.., m, d]."""
    v = hadamard(x) if rotate else exact_float32(x)
    return quantize_float32(v, block=(1, x.shape[-1]), dtype=E4M3, scale_format="ue8m0" if powers else "f32")


def to_arrays(
    x: jax.Array, slots: jax.Array, values: jax.Array, scales: jax.Array, *, rotate: bool, powers: bool
) -> list[jax.Array]:
    """The cache with rows x [n, d] at their slots: values [pages, page, d], scales [pages, page]."""
    new, by = quantize(x, rotate=rotate, powers=powers)
    pages, page, depth = values.shape
    bits = lax.bitcast_convert_type(values.reshape(pages * page, depth), jnp.uint8)
    bits = _put(bits, slots, lax.bitcast_convert_type(new, jnp.uint8))
    flat = _put(scales.reshape(pages * page), slots, by[:, 0])
    return [lax.bitcast_convert_type(bits, values.dtype).reshape(values.shape), flat.reshape(scales.shape)]


def to_bytes(
    x: jax.Array, slots: jax.Array, cache: jax.Array, *, page: int, rotate: bool, powers: bool
) -> list[jax.Array]:
    """The same of a cache of bytes [pages, page * (d + 4)]: the values of a page, and then its scales."""
    depth = x.shape[1]
    pages = cache.shape[0]
    values, scales = cache[:, : page * depth], cache[:, page * depth :]
    apart = (
        lax.bitcast_convert_type(values, E4M3).reshape(pages, page, depth),
        lax.bitcast_convert_type(scales.reshape(pages, page, 4), jnp.float32),
    )
    new = to_arrays(x, slots, *apart, rotate=rotate, powers=powers)
    bits = [lax.bitcast_convert_type(one, jnp.uint8).reshape(pages, -1) for one in new]
    return [jnp.concatenate(bits, axis=1)]


def _put(target: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    return target.at[slots].set(rows, mode="drop", wrap_negative_indices=False)
