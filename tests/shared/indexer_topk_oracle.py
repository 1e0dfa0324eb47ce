"""Scores that are hard to choose from, of operands that are small whole numbers, so that sums in any order
are exact."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

E4M3 = jnp.float8_e4m3fn
HARD = ("mixed", "equal", "ascending", "descending", "one huge", "few values", "all zero", "negative")


def operands(kind: str, s: int, n: int, h: int = 4, d: int = 32, seed: int = 0) -> list[Any]:
    """q, k, scales and weights whose scores, along the keys, are of a kind.

    Sums over heads are those of whole numbers, and exact. What they are along the keys is made by scales.
    """
    rng = np.random.default_rng(seed)
    q = rng.integers(-2, 3, (s, h, d)).astype(np.float32)
    k = rng.integers(-2, 3, (n, d)).astype(np.float32)
    weights = rng.integers(-4, 9, (s, h)).astype(np.float32) / 4
    scales = 2.0 ** rng.integers(-3, 4, n)
    if kind in ("equal", "ascending", "descending", "one huge"):
        q, k, weights = np.abs(q) + 1, np.ones_like(k), np.abs(weights) + 1
        place = np.arange(n)
        scales = {
            "equal": np.ones(n),
            "ascending": 1.0 + place / max(n, 1),
            "descending": 2.0 - place / max(n, 1),
            "one huge": np.where(place == n // 3, 2.0**40, 1.0),
        }[kind]
    elif kind == "few values":
        k = np.where(rng.random((n, 1)) < 0.3, 1.0, -1.0) * np.ones_like(k)
        q, weights, scales = np.ones_like(q), np.ones_like(weights), np.ones(n)
    elif kind == "all zero":
        q, k = np.ones_like(q), -np.ones_like(k)
    elif kind == "negative":
        weights = -np.abs(weights) - 0.25
    return [
        jnp.asarray(q, E4M3),
        jnp.asarray(k, E4M3),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(weights, jnp.float32),
    ]


def windows(s: int, n: int, seed: int = 0) -> list[Any]:
    """All keys, nothing, one key, a few, and anything else."""
    rng = np.random.default_rng(seed)
    start, end = np.sort(rng.integers(0, n + 1, (2, s)), axis=0)
    start[::3], end[::3] = 0, n
    for i, (a, b) in enumerate(((n // 2, n // 2), (n - 1, n), (0, min(7, n)), (n, n))):
        start[4 * i + 1 :: 16], end[4 * i + 1 :: 16] = a, b
    return [jnp.asarray(x, jnp.int32) for x in (start, end)]
