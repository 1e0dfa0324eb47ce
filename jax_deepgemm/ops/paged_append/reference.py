"""Rotary embedding and writing to pages in jax.numpy, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

E4M3 = np.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0


def rotary(x: jax.Array, positions: jax.Array, inv_freq: jax.Array, interleaved: bool) -> jax.Array:
    """x [t, .., d] in float32, its first 2 r numbers turned by angles positions [t] * inv_freq [r]."""
    pairs = inv_freq.shape[0]
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None]
    angles = angles.reshape(-1, *(1,) * (x.ndim - 2), pairs)
    wide, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :].astype(jnp.float32)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else (wide[..., :pairs], wide[..., pairs:])
    turned = a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)
    both = jnp.stack(turned, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(turned, -1)
    return jnp.concatenate([both, rest], axis=-1)


def append(
    k_new: jax.Array,
    v_new: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array,
    v_scale: jax.Array,
    layer: jax.Array,
    positions: jax.Array | None = None,
    inv_freq: jax.Array | None = None,
    q: jax.Array | None = None,
    *,
    dtypes: tuple[np.dtype, ...],
    interleaved: bool,
) -> list[jax.Array]:
    """The cache k, v [l, p, g, s, d] with k_new, v_new [t, g, d] at their slots; and q [t, h, d]."""
    rows = [k_new.astype(jnp.float32), v_new.astype(jnp.float32)]
    if positions is not None and inv_freq is not None:
        rows[0] = rotary(k_new, positions, inv_freq, interleaved)
    if dtypes[0] == E4M3:
        at = jnp.clip(layer[0], 0, k.shape[0] - 1)
        scales = k_scale[at][None, :, None], v_scale[at][None, :, None]
        rows = [jnp.clip(x / scale, -LARGEST, LARGEST) for x, scale in zip(rows, scales, strict=True)]
    rows = [x.astype(dtype) for x, dtype in zip(rows, dtypes, strict=False)]
    found = [_put(pages, layer[0], slots, x) for pages, x in zip((k, v), rows, strict=True)]
    if q is not None:
        assert positions is not None
        assert inv_freq is not None
        found.append(rotary(q, positions, inv_freq, interleaved).astype(q.dtype))
    return found


def _put(pages: jax.Array, layer: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Scatters rows; of FP8 their bits, as XLA for CPUs would make float16 of a whole FP8 cache and back."""
    size = pages.shape[3]
    slots = jnp.where((slots >= 0) & (slots < pages.shape[1] * size), slots, -1)
    kind = jnp.uint8 if pages.dtype == E4M3 else pages.dtype
    target, new = (lax.bitcast_convert_type(x, kind) for x in (pages, rows))
    at = (layer, jnp.where(slots < 0, -1, slots // size), slice(None), slots % size)
    written = target.at[at].set(new, mode="drop", wrap_negative_indices=False)
    return lax.bitcast_convert_type(written, pages.dtype)
