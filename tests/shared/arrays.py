"""Random arrays that need no compiled program: drawn by NumPy, the same for the same seed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """[*shape] of a normal distribution."""
    drawn = np.float32(scale) * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(np.asarray(drawn).astype(dtype))


def normals(seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    """Arrays of these shapes, of different numbers."""
    return [normal(seed + 1000 * i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def optimised(function: Any) -> Any:
    """jax.jit as users have it, for tests of bits: LLVM optimises, which tests/conftest.py turns off."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 3})
