"""Weights of int8 or e4m3 with one scale for each output channel, for tokens in bfloat16."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize.fp4 import shown
from jax_deepgemm.ops.quantize.interop import is_qwix

INT8, E4M3 = np.dtype(jnp.int8), np.dtype(jnp.float8_e4m3fn)
_LARGEST = {INT8: 127.0, E4M3: 448.0}
_SCALES = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16))
_MIN_AMAX = 1e-12


def products() -> Any:
    """The products of these weights. Imported by a relative name: they stand on products that call them here,
    and whose programs do not depend on them (core/version.py)."""
    return importlib.import_module("..mixed.per_channel", __package__)


class PerChannelArray(NamedTuple):
    """A weight [.., k, n] in bytes with a scale for each of n: element = value * scale of its column.

    >>> from jax_deepgemm import quantize_per_channel, ragged_dot
    >>> w = quantize_per_channel(jnp.ones((3, 64, 32)))
    >>> w.values.dtype, w.scales.shape
    (dtype('int8'), (3, 32))
    >>> ragged_dot(jnp.ones((5, 64), jnp.bfloat16), w, jnp.array([1, 0, 2]))[:, 0]
    Array([64, 64, 64, 0, 0], dtype=bfloat16)

    `ragged_dot` takes it as rhs, and `grouped_linear` as w with recipe="bf16". It is for inference: gradients
    raise an error. On a GPU NaN among values of float8_e4m3fn counts as 480: looking for it would be a
    quarter more work of what makes bfloat16 of them. A scale that is NaN makes its column NaN.

    Attributes:
      values: int8 or float8_e4m3fn [.., k, n].
      scales: float32 or bfloat16 [.., n].

    Raises nothing; what it holds is checked by the functions that take it.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(self.values.shape)


def quantize_per_channel(w: ArrayLike, dtype: DTypeLike = jnp.int8) -> PerChannelArray:
    """A weight [.., k, n] in bytes: every column is divided by its scale, largest magnitude / 127 (int8) or
    448 (float8_e4m3fn), and rounded to the nearest number, ties to even.

    >>> w = quantize_per_channel(jnp.array([[1.0, -4.0], [0.5, 2.0]]))
    >>> w.values.tolist(), w.scales.shape
    ([[127, -127], [64, 64]], (2,))

    Args:
      w: [.., k, n] of a floating dtype.
      dtype: int8 or float8_e4m3fn.

    Returns:
      A `PerChannelArray` with float32 scales.

    Raises:
      TypeError, ValueError: another dtype; w that is no floating-point array of two dimensions or more.

    Source: symmetric weight quantisation, a scale a channel. Has no derivative.
    """
    w, kind = unwrapped(w), np.dtype(dtype)
    if kind not in _LARGEST:
        raise ValueError(f"quantize_per_channel: dtype is {kind.name}, need int8 or float8_e4m3fn.")
    if not isinstance(w, (jax.Array, np.ndarray)) or not jnp.issubdtype(w.dtype, jnp.floating) or w.ndim < 2:
        raise TypeError(f"quantize_per_channel: w is {shown(w)}, need a floating-point array [.., k, n].")
    numbers = lax.stop_gradient(jnp.asarray(w)).astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(numbers), axis=-2), _MIN_AMAX)
    scales = amax / _LARGEST[kind]
    scaled = numbers / scales[..., None, :]
    rounded = jnp.round(scaled) if kind == INT8 else scaled
    return PerChannelArray(rounded.astype(kind), scales)


def dequantize_per_channel(w: PerChannelArray, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The numbers [.., k, n] that a `PerChannelArray` stands for.

    >>> dequantize_per_channel(quantize_per_channel(jnp.full((2, 1), 0.75))).tolist()
    [[0.75], [0.75]]

    Args:
      w: a `PerChannelArray`.
      dtype: of the result.

    Returns:
      [.., k, n] in `dtype`.

    Raises:
      TypeError, ValueError: values and scales that do not fit each other.
    """
    values, scales = checked("dequantize_per_channel", "w", w)
    return (values.astype(jnp.float32) * scales.astype(jnp.float32)[..., None, :]).astype(dtype)


def is_per_channel(x: Any) -> bool:
    """Whether an operand is a `PerChannelArray`, or a qwix.QArray that says the same: values of a byte
    [.., k, n] and scales [.., 1, n]."""
    if isinstance(x, PerChannelArray):
        return True
    if not is_qwix(x) or x.zero_point is not None:
        return False
    values, scales = x.qvalue, x.scale
    whole = (*values.shape[:-2], 1, values.shape[-1])
    return np.dtype(values.dtype) in _LARGEST and tuple(scales.shape) == whole


def checked(op: str, name: str, given: Any) -> PerChannelArray:
    """Arrays of an operand for which `is_per_channel`."""
    if isinstance(given, PerChannelArray):
        w = PerChannelArray(*(unwrapped(part) for part in given))
    else:
        w = PerChannelArray(given.qvalue, given.scale[..., 0, :])
    kind, scales = (np.dtype(getattr(part, "dtype", np.void)) for part in w)
    if kind not in _LARGEST or scales not in _SCALES:
        raise TypeError(
            f"{op}: {name} has values {shown(w.values)} and scales {shown(w.scales)}, need int8 or "
            f"float8_e4m3fn, and float32 or bfloat16. Quantise it so: "
            f"jax_deepgemm.quantize_per_channel({name})."
        )
    shape = tuple(w.values.shape)
    if len(shape) < 2 or tuple(w.scales.shape) != (*shape[:-2], *shape[-1:]):
        raise ValueError(
            f"{op}: {name} has values {shown(w.values)} and scales {shown(w.scales)}, need values "
            "[.., k, n] and scales [.., n], one for each column."
        )
    return PerChannelArray(*(jnp.asarray(part) for part in w))
