"""Softmax of attention scores with masks, windows and ALiBi, where a row that sees nothing is zero."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks


def masked_softmax(
    scores: ArrayLike,
    *,
    scale: float = 1.0,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    causal: bool = False,
    q_offset: ArrayLike = 0,
    window: int | None = None,
) -> jax.Array:
    """softmax(scores * scale + bias + slope * (key - position)) over the keys that a query sees.

    Query i stands at position q_offset + i. It sees all keys; with causal those up to its position, and with
    a window of w only the last w of these. A bias of minus infinity hides a key too; finite numbers are
    added.

    >>> import jax.numpy as jnp
    >>> masked_softmax(jnp.zeros((2, 4)), causal=True).tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    >>> masked_softmax(jnp.zeros((1, 4)), causal=True, q_offset=3, window=2).tolist()
    [[0.0, 0.0, 0.5, 0.5]]
    >>> masked_softmax(jnp.zeros((1, 2)), bias=jnp.full(2, -jnp.inf)).tolist()
    [[0.0, 0.0]]

    Args:
      scores: [.., queries, keys] bfloat16, float16 or float32, as [batch, heads, queries, keys].
      scale: a number.
      bias: any of these types, [.., queries, keys] or what broadcasts to that.
      alibi_slopes: [heads], for scores [.., heads, queries, keys]: ALiBi.
      causal: whether keys behind a query's position are hidden.
      q_offset: the position of the first query, a number or integers [batch] for scores [batch, .., queries,
        keys].
      window: how many keys a query sees at most, its own included; needs causal.

    Returns:
      As scores; computed in float32. Rows that see no key are zero.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Differentiable. Source: ALiBi: Press et al., arXiv:2108.12409.
    """
    op = "masked_softmax"
    given = checks.floats(op, "scores", scores)
    if given.ndim < 2:
        raise ValueError(f"{op}: scores are {list(given.shape)}, need [.., queries, keys].")
    view = View.of(op, given.shape, causal, q_offset, window)
    wide = given.astype(jnp.float32) * float(scale)
    return softmax(op, wide, view, bias, alibi_slopes).astype(given.dtype)


@dataclass(frozen=True)
class View:
    """What queries see of keys, whatever the numbers are.

    Attributes:
      shape: of the scores, [.., queries, keys].
      causal, window: as in `masked_softmax`.
      first: int32 [batch or 1, 1 ..], the position of the first query, of as many dimensions as the scores.
      ends: int32 of such dimensions: keys from there on are not seen; None: all are there.
    """

    shape: tuple[int, ...]
    causal: bool
    window: int | None
    first: jax.Array
    ends: jax.Array | None = None

    @classmethod
    def of(
        cls, op: str, shape: tuple[int, ...], causal: bool, q_offset: Any, window: Any, kv_lens: Any = None
    ) -> View:
        """The arguments of a caller, checked."""
        if window is not None:
            window = checks.whole(op, "window", window, 1)
            if not causal:
                raise ValueError(f"{op}: window is {window} and causal is False, need causal=True.")
        first = cls._of_batch(op, "q_offset", q_offset, shape)
        ends = None if kv_lens is None else cls._of_batch(op, "kv_lens", kv_lens, shape)
        return cls(shape, bool(causal), window, first, ends)

    @staticmethod
    def _of_batch(op: str, name: str, given: Any, shape: tuple[int, ...]) -> jax.Array:
        numbers = checks.integers(op, name, given, "[batch]")
        if numbers.ndim > 1 or (numbers.ndim == 1 and (len(shape) < 3 or numbers.shape[0] != shape[0])):
            raise ValueError(
                f"{op}: {name} is {list(numbers.shape)}, need a number, or one for each of "
                f"{shape[0] if len(shape) > 2 else 1} sequences."
            )
        return numbers.reshape(-1, *(1,) * (len(shape) - 1))

    def _along(self, axis: int) -> jax.Array:
        shape = [1] * len(self.shape)
        shape[axis] = self.shape[axis]
        return lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)

    @property
    def keys(self) -> jax.Array:
        """The number of each key."""
        return self._along(-1)

    @property
    def positions(self) -> jax.Array:
        """The position of each query."""
        return self.first + self._along(-2)

    def seen(self) -> jax.Array | None:
        """bool, broadcasts to the scores; None: everything is seen."""
        return self._between(self.positions, self.positions)

    def met(self) -> jax.Array | None:
        """bool [batch or 1, .., 1, keys]: keys that a query of the sequence can see at all; None: all."""
        return self._between(self.first, self.first + (self.shape[-2] - 1))

    def _between(self, first: jax.Array, last: jax.Array) -> jax.Array | None:
        tests = []
        if self.causal:
            tests.append(self.keys <= last)
        if self.window is not None:
            tests.append(self.keys > first - self.window)
        if self.ends is not None:
            tests.append(self.keys < self.ends)
        return functools.reduce(jnp.logical_and, tests) if tests else None


def softmax(op: str, wide: jax.Array, view: View, bias: Any, alibi_slopes: Any) -> jax.Array:
    """Of float32 scores."""
    if bias is not None:
        added = checks.fitted(op, "bias", checks.floats(op, "bias", bias), wide.shape, "the scores")
        wide = wide + added.astype(jnp.float32)
    if alibi_slopes is not None:
        heads = wide.shape[-3] if wide.ndim > 2 else 0
        slopes = checks.floats(op, "alibi_slopes", alibi_slopes)
        slopes = checks.shaped(op, "alibi_slopes", slopes, (heads,), "one slope for each head of the scores")
        slopes = jnp.expand_dims(slopes.astype(jnp.float32), (*range(wide.ndim - 3), -2, -1))
        wide = wide + slopes * (view.keys - view.positions).astype(jnp.float32)
    seen = view.seen()
    if seen is not None:
        wide = jnp.where(seen, wide, -jnp.inf)
    top = lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True, initial=-jnp.inf))
    powers = jnp.exp(wide - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers / jnp.where(total == 0, 1.0, total)
