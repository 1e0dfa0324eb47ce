"""Small matrices whose rows and columns have sums of 1, in jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def sinkhorn(logits: jax.Array, *, iterations: int, eps: float) -> jax.Array:
    """Logits [t, n, n] float32 -> matrices.

    >>> m = sinkhorn(jnp.zeros((1, 2, 2)), iterations=3, eps=0.0)
    >>> m.tolist()
    [[[0.5, 0.5], [0.5, 0.5]]]
    """

    def step(m: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _divided(_divided(m, -1, eps), -2, eps), None

    first = _divided(jax.nn.softmax(logits, axis=-1) + eps, -2, eps)
    return lax.scan(step, first, length=iterations - 1)[0]


def _divided(m: jax.Array, axis: int, eps: float) -> jax.Array:
    return m / (jnp.sum(m, axis=axis, keepdims=True) + eps)


def push(logits: jax.Array, by: jax.Array, *, iterations: int, eps: float) -> jax.Array:
    """The tangent of the matrices for that of the logits."""
    return jax.jvp(lambda x: sinkhorn(x, iterations=iterations, eps=eps), (logits,), (by,))[1]


def pull(logits: jax.Array, by: jax.Array, *, iterations: int, eps: float) -> jax.Array:
    """The gradient of the logits for that of the matrices."""
    return jax.vjp(lambda x: sinkhorn(x, iterations=iterations, eps=eps), logits)[1](by)[0]
