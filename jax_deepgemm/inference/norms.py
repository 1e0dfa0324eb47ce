"""Layer norm and RMS norm of rows, also of sums of a row, its residual and a bias."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks

KINDS = ("layer", "rms")


@overload
def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    return_sum: Literal[False] = ...,
) -> jax.Array: ...


@overload
def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    kind: str = ...,
    eps: float = ...,
    residual: ArrayLike | None = ...,
    bias: ArrayLike | None = ...,
    return_sum: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    return_sum: bool = False,
) -> Any:
    """A norm of each row of s = x + residual + bias.

        layer   (s - mean(s)) / sqrt(var(s) + eps) * gamma + beta        var: mean of (s - mean(s))^2
        rms     s / sqrt(mean(s^2) + eps) * gamma + beta

    >>> import jax.numpy as jnp
    >>> norm(jnp.array([[1.0, 3.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    >>> y, s = norm(jnp.array([[3.0, 3.0]]), kind="rms", eps=0.0, residual=jnp.ones((1, 2)), return_sum=True)
    >>> y.tolist(), s.tolist()
    ([[1.0, 1.0]], [[4.0, 4.0]])

    Args:
      x: [.., h] bfloat16, float16 or float32, with h > 0.
      gamma, beta: [h] of any of these types, or None.
      kind: "layer" or "rms".
      eps: added to the variance, or the mean of squares.
      residual: [.., h] in the dtype of x, or None.
      bias: [h], or None.
      return_sum: also return s.

    Returns:
      [.., h] in the dtype of x; or (that, s). s is the sum in float32, rounded once to the dtype of x, and
      what is normalised is that rounded s. Everything is computed in float32, the variance from differences,
      so that a mean much larger than they are does not drown it.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Differentiable. Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
    """
    given = summed("norm", x, residual, bias)
    y = normed("norm", given, gamma, beta, kind, eps)
    return (y, given) if return_sum else y


def summed(op: str, x: Any, residual: Any, bias: Any) -> jax.Array:
    """x + residual + bias, rounded once to the dtype of x."""
    given = checks.floats(op, "x", x)
    if given.ndim < 1 or given.shape[-1] < 1:
        raise ValueError(f"{op}: x is {list(given.shape)}, need [.., h] with h > 0.")
    if residual is None and bias is None:
        return given
    wide = given.astype(jnp.float32)
    if residual is not None:
        other = checks.floats(op, "residual", residual, like=given)
        wide = wide + checks.shaped(op, "residual", other, given.shape, "as x").astype(jnp.float32)
    if bias is not None:
        wide = wide + checks.row(op, "bias", bias, given.shape[-1], given.ndim)
    return wide.astype(given.dtype)


def normed(op: str, given: jax.Array, gamma: Any, beta: Any, kind: Any, eps: Any) -> jax.Array:
    """The norm of each row."""
    checks.choice(op, "kind", kind, KINDS)
    wide = given.astype(jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    squares = jnp.mean(wide * wide, axis=-1, keepdims=True)
    y = wide * lax.rsqrt(squares + float(eps))
    if gamma is not None:
        y = y * checks.row(op, "gamma", gamma, given.shape[-1], given.ndim)
    if beta is not None:
        y = y + checks.row(op, "beta", beta, given.shape[-1], given.ndim)
    return y.astype(given.dtype)
