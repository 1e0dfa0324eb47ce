"""FP4: numbers of e2m1, two of them in a byte, with a scale of UE8M0 for every 32 of a row, and how rows of
them become rows of e4m3.

    e2m1 * 2**(code - 127)  =  e4m3 * 2**(base - 127)        base = largest code of the row - 6

e4m3 holds every number of e2m1 times 2**-8 to 2**6. So a row of which no block's scale is more than 2**14
times smaller than another's becomes one of e4m3 with one scale without any rounding. Where blocks lie further
apart, numbers of the smaller ones become multiples of 2**-15 times the largest scale, rounded to even.
include/jax_deepgemm/indexer/expand.cuh does the same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.indexer.family import DEPTHS
from jax_deepgemm.ops.quantize import ceil_to_ue8m0

BLOCK = 32
"""Numbers of a scale."""
WORD = 4
"""Scales of an int32, those of a row of 128."""
LARGEST_SHIFT = 6
"""6 * 2**6 is e4m3's largest number that is one of e2m1 times a power of two."""
_MIN_AMAX, _LARGEST = 1e-4, 6.0
_SCALES, _WORDS, _CODES = np.dtype(jnp.float8_e8m0fnu), np.dtype(np.int32), np.dtype(np.uint8)
_BYTES, _NUMBERS = (np.dtype(np.uint8), np.dtype(np.int8)), np.dtype(jnp.float4_e2m1fn)
_BIAS, _NAN, _MANTISSA = 127, 255, 23


class Fp4Array(NamedTuple):
    """FP4 numbers with a scale of every 32 of a row: element = value * scale of its block.

    >>> quantize_fp4(jnp.ones((5, 64))).values.shape
    (5, 32)

    Attributes:
      values: uint8 [.., d / 2], two numbers of e2m1 in a byte, the lower four bits first. int8 bytes of other
        libraries, and float4_e2m1fn [.., d], are taken as well.
      scales: float8_e8m0fnu [.., d / 32]; or int32 [..], four of them in a word, the lowest byte first.

    Raises nothing; what it holds is checked by the functions that take it.
    """

    values: jax.Array
    scales: jax.Array


def quantize_fp4(x: ArrayLike) -> Fp4Array:
    """x in FP4: blocks of 32 along the last dimension, each with a power of two as its scale.

    The scale is max(amax, 1e-4) / 6, rounded up to a power of two; numbers are rounded to the nearest, ties
    to even.

    >>> x = jnp.linspace(-6, 6, 32)
    >>> q = quantize_fp4(x)
    >>> q.values.shape, q.scales
    ((16,), Array([1], dtype=float8_e8m0fnu))
    >>> dequantize_fp4(q)[:8].tolist()
    [-6.0, -6.0, -6.0, -4.0, -4.0, -4.0, -4.0, -3.0]

    Args:
      x: [.., d] of a floating dtype, d a multiple of 32.

    Returns:
      An `Fp4Array`.

    Raises:
      TypeError: x is no floating-point array.
      ValueError: d is no multiple of 32.

    Has no derivative. Infinities and NaN make their block NaN. Source: DeepGEMM's per_token_cast_to_fp4, of
    which ties go to the smaller number.
    """
    x = unwrapped(x)
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantize_fp4: x is {_shown(x)}, need a floating-point array [.., d].")
    if x.ndim < 1 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"quantize_fp4: x is {_shown(x)}, need [.., d], d a multiple of 32: pad it with zeros."
        )
    blocks = lax.stop_gradient(jnp.asarray(x).astype(jnp.float32)).reshape(*x.shape[:-1], -1, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = ceil_to_ue8m0(jnp.maximum(amax, _MIN_AMAX) / _LARGEST)
    codes = _encoded(blocks / scale).reshape(x.shape)
    values = codes[..., ::2] | codes[..., 1::2] << 4
    exponent = lax.bitcast_convert_type(scale[..., 0], jnp.uint32) >> _MANTISSA
    exponent = jnp.where(jnp.isfinite(amax[..., 0]), exponent, _NAN)
    return Fp4Array(values, lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu))


def _encoded(x: jax.Array) -> jax.Array:
    """uint8 codes of e2m1, nearest, ties to even: how many of the numbers between them x is beyond."""
    a = jnp.abs(x)
    beyond = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5)
    code = sum(one.astype(jnp.uint8) for one in beyond)
    return code | jnp.where((x < 0) & (code > 0), 8, 0).astype(jnp.uint8)


def dequantize_fp4(q: Fp4Array | tuple[ArrayLike, ArrayLike], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The numbers that FP4 stands for.

    >>> dequantize_fp4(quantize_fp4(jnp.full(32, 0.75)))[:3].tolist()
    [0.75, 0.75, 0.75]

    Args:
      q: an `Fp4Array`, or (values [.., d / 2], scales [.., d / 32]) as it has them.
      dtype: of the result.

    Returns:
      [.., d] in `dtype`.

    Raises:
      TypeError, ValueError: values and scales that are no FP4, or do not fit each other.
    """
    if not is_fp4(q):
        raise TypeError(f"dequantize_fp4: q is {_shown(q)}, need an Fp4Array, or (values, scales).")
    values = _packed("dequantize_fp4", "q", q[0])
    depth = 2 * values.shape[-1]
    codes = _codes("dequantize_fp4", "q", unwrapped(q[1]), values.shape[:-1], depth)
    scales = lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu).astype(jnp.float32)
    numbers = _decoded(values).reshape(*codes.shape, BLOCK) * scales[..., None]
    return numbers.reshape(*values.shape[:-1], depth).astype(dtype)


def _decoded(values: jax.Array) -> jax.Array:
    """float32 [.., d] of bytes [.., d / 2]."""
    codes = jnp.stack([values & 15, values >> 4], axis=-1).astype(jnp.int32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    magnitude = 0.5 * halves.astype(jnp.float32)
    numbers = jnp.where(codes & 8 != 0, -magnitude, magnitude)
    return numbers.reshape(*values.shape[:-1], 2 * values.shape[-1])


def expand(values: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as e4m3 [.., d], and their scales, float32 [..], of bytes [.., d / 2] and words [..].

    >>> q = jnp.full((1, 16), 0x42, jnp.uint8), jnp.full(1, 127, jnp.int32)
    >>> values, scales = expand(*q)
    >>> values[0, :3].tolist(), scales.tolist()
    ([64.0, 128.0, 64.0], [0.015625])
    """
    numbers = _decoded(values)
    blocks = numbers.reshape(*values.shape[:-1], -1, BLOCK)
    codes = lax.bitcast_convert_type(words, jnp.uint8)[..., : blocks.shape[-2]].astype(jnp.int32)
    counts = jnp.any(values.reshape(*codes.shape, BLOCK // 2) & 0x77 != 0, axis=-1)
    each = jnp.where(counts, codes, 0)
    largest = functools.reduce(jnp.maximum, [each[..., i] for i in range(codes.shape[-1])])
    base = jnp.maximum(largest - LARGEST_SHIFT, 1)
    shift = jnp.clip(codes - base[..., None], -40, LARGEST_SHIFT)
    factors = lax.bitcast_convert_type((shift + _BIAS) << _MANTISSA, jnp.float32)
    expanded = (blocks * factors[..., None]).astype(jnp.float8_e4m3fn).reshape(numbers.shape)
    scales = lax.bitcast_convert_type(base << _MANTISSA, jnp.float32)
    nan = functools.reduce(jnp.logical_or, [codes[..., i] == _NAN for i in range(codes.shape[-1])])
    return expanded, jnp.where(nan, jnp.nan, scales)


def is_packed(keys: Any) -> bool:
    """Whether an array of keys is bytes of FP4."""
    return bool(keys.dtype == _CODES)


# Operands --------------------------------------------------------------------------------------------------


def is_fp4(x: Any) -> bool:
    """Whether an operand is values and scales, the values FP4 or bytes."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        return False
    dtype = getattr(unwrapped(x[0]), "dtype", None)
    return dtype is not None and (dtype in _BYTES or dtype == _NUMBERS)


def fp4_operand(op: str, name: str, x: Any, rank: str) -> tuple[jax.Array, jax.Array]:
    """Bytes [.., d / 2] and words of scales [..] of an FP4 operand of d 32, 64 or 128.

    Args:
      op, name: for errors.
      x: for which `is_fp4`.
      rank: of the operand, such as "[n, d]".
    """
    values = _packed(op, name, x[0])
    depth = 2 * values.shape[-1]
    if values.ndim != rank.count(",") + 1:
        raise ValueError(
            f"{op}: values of {name} are {_shown(unwrapped(x[0]))}, need {rank.replace('d]', 'd / 2]')} of "
            f"bytes, or {rank} of float4_e2m1fn. Use jax.vmap for leading batch dimensions."
        )
    if depth not in DEPTHS:
        raise ValueError(
            f"{op}: values of {name} are {_shown(unwrapped(x[0]))}: d is {depth}, need one of "
            f"{', '.join(map(str, DEPTHS))}. Pad q and kv with zeros, which changes no logit."
        )
    return values, _words(_codes(op, name, unwrapped(x[1]), values.shape[:-1], depth))


def _packed(op: str, name: str, given: Any) -> jax.Array:
    x = unwrapped(given)
    if x.ndim < 1 or (x.dtype == _NUMBERS and x.shape[-1] % 2):
        raise ValueError(f"{op}: values of {name} are {_shown(x)}, need [.., d / 2] of bytes, d even.")
    x = jnp.asarray(x)
    if x.dtype == _NUMBERS:
        return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint8)
    return lax.bitcast_convert_type(x, jnp.uint8)


def _codes(op: str, name: str, x: Any, lead: tuple[int, ...], depth: int) -> jax.Array:
    """Scales as uint8 [.., d / 32]."""
    dtype, shape = getattr(x, "dtype", None), tuple(getattr(x, "shape", ()))
    blocks = depth // BLOCK
    rule = f"float8_e8m0fnu {[*lead, blocks]}" + (f", or int32 {list(lead)}" if blocks <= WORD else "")
    if dtype == _SCALES and shape == (*lead, blocks) and depth % BLOCK == 0:
        return lax.bitcast_convert_type(jnp.asarray(x), jnp.uint8)
    if dtype == _WORDS and shape in (lead, (*lead, 1)) and blocks <= WORD:
        return lax.bitcast_convert_type(jnp.asarray(x).reshape(lead), jnp.uint8)[..., :blocks]
    error = ValueError if dtype in (_SCALES, _WORDS) else TypeError
    raise error(
        f"{op}: scales of {name} are {_shown(x)}, need {rule}: one for 32 numbers of a row. Quantise "
        f"it so: quantize_fp4({name})."
    )


def _words(codes: jax.Array) -> jax.Array:
    """int32 [..] of codes [.., d / 32]; of those that a row has not, 2**0."""
    missing = WORD - codes.shape[-1]
    padded = jnp.pad(codes, ((0, 0),) * (codes.ndim - 1) + ((0, missing),), constant_values=_BIAS)
    return lax.bitcast_convert_type(padded, jnp.int32)


def _shown(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name} {list(x.shape)}"
    return f"a {type(x).__name__}"
