"""Operands of grouped GEMMs, and what they are compared with: NumPy in float64, one row after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.shared.gemm_oracle import scales_of

E4 = jnp.dtype(jnp.float8_e4m3fn)
BF16 = jnp.dtype(jnp.bfloat16)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def rows_of(sizes: Sequence[int], m: int) -> np.ndarray:
    """The group of each of m rows, -1 in the tail; negative sizes count as 0, and the last group is cut."""
    index = [group for group, size in enumerate(sizes) for _ in range(min(max(size, 0), m))]
    return np.array((index + [-1] * m)[:m], np.int32)


def random(seed: int, *shape: int, dtype: Any = BF16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def fp8(seed: int, *shape: int, block: tuple[int, int] = (1, 128), dtype: Any = E4) -> tuple[Any, Any]:
    """Random stored values and scales, not from a quantiser."""
    rng = np.random.default_rng(seed)
    *lead, rows, cols = shape
    scales = scales_of(rng, *lead, -(-rows // block[0]), -(-cols // block[1]))
    return rng.standard_normal(shape).astype(dtype), scales


def dequantized(operand: tuple[Any, Any], block: tuple[int, int] = (1, 128)) -> np.ndarray:
    """float64 of values and scales, one element after the other."""
    values, scales = map(wide, operand)
    row = np.arange(values.shape[-2]) // block[0]
    col = np.arange(values.shape[-1]) // block[1]
    return values * scales[..., row[:, None], col]


def m_grouped(a: np.ndarray, b: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[m, n] of a [m, k], b [g, n, k]; rows of no group are zero."""
    d = np.zeros((a.shape[0], b.shape[1]))
    for group in range(b.shape[0]):
        d[index == group] = wide(a)[index == group] @ wide(b)[group].T
    return d


def masked(a: np.ndarray, b: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """[g, m, n] of a [g, m, k], b [g, n, k]; rows that do not count are zero."""
    d = np.einsum("gmk,gnk->gmn", wide(a), wide(b))
    for group, count in enumerate(counts):
        d[group, max(count, 0) :] = 0
    return d


def k_grouped(a: np.ndarray, b: np.ndarray, index: np.ndarray, groups: int) -> np.ndarray:
    """[g, m, n] of a [k, m], b [k, n]."""
    a, b = wide(a), wide(b)
    return np.stack([a[index == group].T @ b[index == group] for group in range(groups)])
