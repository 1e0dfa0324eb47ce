"""What the functions of jax_deepgemm.inference compute, in float64, written from their formulas."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""From one number of a type to the next."""


def drawn(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    """Normal numbers, rounded to a type, as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def close(got: Any, want: np.ndarray, units: float = 4.0) -> None:
    """Within some units of the type in the last place, of the largest number of the result."""
    name = jnp.asarray(got).dtype.name
    got = wide(got)
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    largest = max(1.0, float(np.abs(want).max(initial=0)))
    worst = float(np.abs(got - want).max(initial=0))
    assert worst <= units * EPS[name] * largest, f"{worst} of {largest} in {name}"


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def identity(x: np.ndarray) -> np.ndarray:
    return x


ACTIVATIONS = {
    "identity": identity, "relu": relu, "gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf, "silu": silu,
}  # fmt: skip


def layer_norm(x: np.ndarray, gamma: Any = 1.0, beta: Any = 0.0, eps: float = 1e-5) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * gamma + beta


def rms_norm(x: np.ndarray, gamma: Any = 1.0, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gamma


def rotary(x: np.ndarray, positions: Any, rates: np.ndarray, interleaved: bool = False) -> np.ndarray:
    """x [.., heads, d]: pairs of numbers are turned as complex numbers."""
    out, r = x.copy(), len(rates)
    first = np.arange(0, 2 * r, 2) if interleaved else np.arange(r)
    second = first + (1 if interleaved else r)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(
        1j * np.asarray(positions, np.float64)[..., None, None] * rates
    )
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def rates(dim: int, theta: float = 10000.0) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Row by row over what is seen; zeros where nothing is."""
    scores, seen = np.broadcast_arrays(scores, seen)
    out = np.zeros(scores.shape)
    for row in np.ndindex(scores.shape[:-1]):
        keys = seen[row] & (scores[row] > -np.inf)
        if keys.any():
            powers = np.exp(scores[row][keys] - scores[row][keys].max())
            out[row][keys] = powers / powers.sum()
    return out


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    end: int | None = None,
) -> np.ndarray:
    """bool [queries, keys]."""
    seen = np.ones((queries, keys), bool)
    for i in range(queries):
        for key in range(keys):
            position = offset + i
            if causal and key > position:
                seen[i, key] = False
            if window is not None and key <= position - window:
                seen[i, key] = False
            if end is not None and key >= end:
                seen[i, key] = False
    return seen


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, added: Any = 0.0, scale: Any = None
) -> np.ndarray:
    """q [b, s, h, d], k, v [b, l, kv, ..], seen, added [b, h, s, l]; what is not seen is not read."""
    b, s, h, d = q.shape
    per = h // k.shape[2]
    scale = d**-0.5 if scale is None else scale
    seen = np.broadcast_to(seen, (b, h, s, k.shape[1]))
    added = np.broadcast_to(added, seen.shape)
    out = np.zeros((b, s, h, v.shape[3]))
    for i, head, row in np.ndindex(b, h, s):
        keys = seen[i, head, row]
        if keys.any():
            scores = k[i, keys, head // per] @ q[i, row, head] * scale + added[i, head, row, keys]
            out[i, row, head] = softmax(scores, np.ones(scores.shape, bool)) @ v[i, keys, head // per]
    return out
