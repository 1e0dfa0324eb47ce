"""Rotary position embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks

STYLES = ("half", "interleaved")


def rotary(
    x: ArrayLike,
    positions: ArrayLike,
    *,
    dim: int | None = None,
    theta: float = 10000.0,
    style: str = "half",
    inv_freq: ArrayLike | None = None,
) -> jax.Array:
    """Rotates pairs of the first `dim` numbers of every head by angles that grow with its token's position.

        pair i = 0 .. dim / 2 - 1     "half": numbers i and i + dim / 2; "interleaved": 2 i and 2 i + 1
        angle                         position * theta^(-2 i / dim)
        (u, v) becomes                (u cos - v sin, u sin + v cos)

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0, 5.0]]])                               # one token, one head, of 3 numbers
    >>> rotary(x, jnp.array([0]), dim=2).tolist()
    [[[1.0, 0.0, 5.0]]]
    >>> turned = rotary(x, jnp.array([1]), inv_freq=jnp.array([jnp.pi / 2]))
    >>> [round(number) for number in turned[0, 0].tolist()]
    [0, 1, 5]

    Args:
      x: [.., heads, d] bfloat16, float16 or float32, as [tokens, heads, d] or [batch, tokens, heads, d].
      positions: integers that broadcast to [..] of x, as [tokens]: where each token stands in its sequence.
      dim: an even number up to d; None: all of d, or twice as many as inv_freq has.
      theta: the base, a number.
      style: which numbers are pairs: "half" (Llama, GPT-NeoX) or "interleaved" (GPT-J).
      inv_freq: float32 [dim / 2] in place of the powers of theta, as scaled ones (Llama 3, YaRN).

    Returns:
      [.., heads, d] in the dtype of x; angles and products in float32. Numbers from dim on are as they were.

    Raises:
      TypeError, ValueError: types, shapes and sizes that do not fit.

    Differentiable with respect to x. Source: Su et al., arXiv:2104.09864.
    """
    op = "rotary"
    given = checks.floats(op, "x", x)
    checks.choice(op, "style", style, STYLES)
    if given.ndim < 2:
        raise ValueError(f"{op}: x is {list(given.shape)}, need [.., heads, d]: x[:, None] for one head.")
    where = checks.integers(op, "positions", positions, "[..] of x")
    where = checks.fitted(op, "positions", where, given.shape[:-2], "the dimensions of x in front of heads")
    rates = frequencies(op, given.shape[-1], dim, theta, inv_freq)
    angles = where.astype(jnp.float32)[..., None] * jnp.expand_dims(rates, tuple(range(where.ndim)))
    cos, sin = (jnp.expand_dims(function(angles), -2) for function in (jnp.cos, jnp.sin))
    return rotated(given, cos, sin, style)


def frequencies(op: str, d: int, dim: Any, theta: Any, inv_freq: Any) -> jax.Array:
    """What a position is multiplied by, float32 [dim / 2]."""
    if inv_freq is not None:
        rates = checks.floats(op, "inv_freq", inv_freq)
        if rates.dtype != jnp.float32 or rates.ndim != 1:
            raise TypeError(
                f"{op}: inv_freq is {checks.described(rates)}, need float32 [dim / 2]: other types have too "
                "few digits for long sequences. Compute it in float32."
            )
        dim = 2 * rates.shape[0] if dim is None else dim
    size = d if dim is None else checks.whole(op, "dim", dim, 0)
    if size % 2 or size > d:
        raise ValueError(
            f"{op}: {size} of {d} numbers of a head rotate, need an even number up to {d}: dim=.."
        )
    if inv_freq is None:
        powers = float(theta) ** (-np.arange(0, size, 2) / max(size, 1))
        return jnp.asarray(powers, jnp.float32)
    return checks.shaped(op, "inv_freq", rates, (size // 2,), f"half of dim={size}")


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, style: str) -> jax.Array:
    """cos, sin: float32, of as many dimensions as x, the last one half of those that rotate."""
    size = 2 * cos.shape[-1]
    wide, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    if style == "half":
        u, v = wide[..., : size // 2], wide[..., size // 2 :]
    else:
        pairs = wide.reshape(*wide.shape[:-1], size // 2, 2)
        u, v = pairs[..., 0], pairs[..., 1]
    turned = (u * cos - v * sin, u * sin + v * cos)
    if style == "half":
        new = jnp.concatenate(turned, axis=-1)
    else:
        new = jnp.stack(turned, axis=-1).reshape(wide.shape)
    return jnp.concatenate([new.astype(x.dtype), rest], axis=-1)
