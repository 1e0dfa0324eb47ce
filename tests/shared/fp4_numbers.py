"""FP4 arrays to try, and what they mean, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_deepgemm.indexer import Fp4Array

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BYTES = np.arange(16, dtype=np.uint8) | np.arange(16, dtype=np.uint8)[::-1] << 4
"""All numbers, in both halves."""


def meant(q: Any) -> np.ndarray:
    """float64 numbers of uint8 values and float8_e8m0fnu scales."""
    values, scales = map(np.asarray, q)
    numbers = NUMBERS[np.stack([values & 15, values >> 4], axis=-1)].reshape(*values.shape[:-1], -1)
    codes = scales.view(np.uint8).astype(int)
    scales = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
    return numbers * np.repeat(scales, 32, axis=-1)


def random(seed: int, *shape: int, lowest: int = 120, highest: int = 134) -> Fp4Array:
    """Any four bits, scales of 2**(lowest - 127) to 2**(highest - 127): rows that e4m3 holds exactly."""
    rng = np.random.default_rng(seed)
    *lead, depth = shape
    values = rng.integers(0, 256, (*lead, depth // 2)).astype(np.uint8)
    codes = rng.integers(lowest, highest + 1, (*lead, depth // 32)).astype(np.uint8)
    return Fp4Array(jnp.asarray(values), scales_of(codes))


def random_nvfp4(seed: int, *shape: int) -> Fp4Array:
    """Any four bits, any scales but NaN and negative ones, and a global scale a matrix."""
    rng = np.random.default_rng(seed)
    *lead, depth = shape
    values = rng.integers(0, 256, (*lead, depth // 2)).astype(np.uint8)
    scales = rng.integers(0, 127, (*lead, depth // 16)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    whole = rng.uniform(0.001, 0.1, lead[:-1]).astype(np.float32)
    return Fp4Array(jnp.asarray(values), jnp.asarray(scales), jnp.asarray(whole))


def scales_of(codes: np.ndarray) -> jax.Array:
    """float8_e8m0fnu of uint8."""
    return jnp.asarray(np.ascontiguousarray(codes).view(ml_dtypes.float8_e8m0fnu))


def words(q: Fp4Array) -> jax.Array:
    """Scales of rows, four in an int32, and what fewer of them leave."""
    codes = np.asarray(q.scales).view(np.uint8)
    missing = np.full((*codes.shape[:-1], 4 - codes.shape[-1]), 250, np.uint8)
    return jnp.asarray(np.concatenate([codes, missing], axis=-1).view(np.int32)[..., 0])
