"""FP4: numbers of e2m1, two of them in a byte, with a scale of UE8M0 for every 32 of a row.

element = e2m1 * 2**(code - 127)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize.reference import SMALLEST_NORMAL
from jax_deepgemm.ops.quantize.scale_layout import ceil_to_ue8m0

E2M1 = np.dtype(jnp.float4_e2m1fn)
BLOCK = 32
"""Numbers of a scale."""
WORD = 4
"""Scales of an int32, those of a row of 128."""
NAN = 255
"""The code of NaN."""
BIAS, MANTISSA = 127, 23
MAGNITUDES = 0x77
"""The bits of a byte that are no signs."""
_MIN_AMAX, _LARGEST = 1e-4, 6.0
_SCALES, _WORDS = np.dtype(jnp.float8_e8m0fnu), np.dtype(np.int32)
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fp4Array:
    """FP4 numbers with a scale of every 32 of a row: element = value * scale of its block. A pytree.

    >>> q = quantize_fp4(jnp.ones((3, 5, 64)))
    >>> q.shape, q.values.shape, q.scales.shape
    ((3, 5, 64), (3, 5, 32), (3, 5, 2))
    >>> q[1].shape
    (5, 64)

    Attributes:
      values: uint8 [.., d / 2], two numbers of e2m1 in a byte, the lower four bits first. int8 bytes of other
        libraries, and float4_e2m1fn [.., d], are taken as well.
      scales: float8_e8m0fnu [.., d / 32]; in an indexer's operands also int32 [..], four of them in a word,
        the lowest byte first.

    An index is one of leading dimensions. It unpacks as (values, scales). Raises nothing; what it holds is
    checked by the functions that take it.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers, [.., d]."""
        *lead, last = self.values.shape
        return (*lead, last if self.values.dtype == E2M1 else 2 * last)

    @property
    def ndim(self) -> int:
        """Rank of the numbers."""
        return len(self.values.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float4_e2m1fn, also where bytes are stored."""
        return E2M1

    def __getitem__(self, index: Any) -> Fp4Array:
        """The same of some of the leading dimensions.

        Raises:
          IndexError: an index of the last dimension, which scales have blocks of.
        """
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(part is not None for part in parts)
        if any(part is Ellipsis or getattr(part, "dtype", None) == np.bool_ for part in parts):
            used = self.ndim
        if used > self.ndim - 1:
            raise IndexError(
                f"Fp4Array: index {index!r} of numbers {list(self.shape)}: only the {self.ndim - 1} leading "
                "dimensions can be indexed (no Ellipsis, no masks). Index .values and .scales for others."
            )
        return Fp4Array(self.values[index], self.scales[index])

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.values, self.scales))


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
    return encode("quantize_fp4", x, _MIN_AMAX)


def encode(where: str, x: Any, min_amax: float = 0.0) -> Fp4Array:
    """`quantize_fp4` of blocks whose amax counts as at least `min_amax`. where: for errors."""
    x = unwrapped(x)
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where}: x is {shown(x)}, need a floating-point array [.., d].")
    if x.ndim < 1 or x.shape[-1] % BLOCK:
        raise ValueError(f"{where}: x is {shown(x)}, need [.., d], d a multiple of 32: pad it with zeros.")
    blocks = lax.stop_gradient(jnp.asarray(x).astype(jnp.float32)).reshape(*x.shape[:-1], -1, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = ceil_to_ue8m0(jnp.maximum(amax, max(min_amax, _LARGEST * SMALLEST_NORMAL)) / _LARGEST)
    codes = _encoded(blocks / scale).reshape(x.shape)
    values = codes[..., ::2] | codes[..., 1::2] << 4
    exponent = lax.bitcast_convert_type(scale[..., 0], jnp.uint32) >> MANTISSA
    exponent = jnp.where(jnp.isfinite(amax[..., 0]), exponent, NAN)
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
    parts = parts_of(q)
    if parts is None:
        raise TypeError(f"dequantize_fp4: q is {shown(q)}, need an Fp4Array, or (values, scales).")
    values = packed("dequantize_fp4", "q", parts[0])
    depth = 2 * values.shape[-1]
    codes = codes_of("dequantize_fp4", "q", parts[1], values.shape[:-1], depth)
    scales = lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu).astype(jnp.float32)
    numbers = decoded(values).reshape(*codes.shape, BLOCK) * scales[..., None]
    return numbers.reshape(*values.shape[:-1], depth).astype(dtype)


def decoded(values: jax.Array) -> jax.Array:
    """float32 [.., d] of bytes [.., d / 2]."""
    codes = jnp.stack([values & 15, values >> 4], axis=-1).astype(jnp.int32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    magnitude = 0.5 * halves.astype(jnp.float32)
    numbers = jnp.where(codes & 8 != 0, -magnitude, magnitude)
    return numbers.reshape(*values.shape[:-1], 2 * values.shape[-1])


# Operands --------------------------------------------------------------------------------------------------


def parts_of(x: Any) -> tuple[Any, Any] | None:
    """Values and scales of an operand whose values are FP4 or bytes; None of another."""
    pair = (x.values, x.scales) if isinstance(x, Fp4Array) else x
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return None
    values, scales = map(unwrapped, pair)
    return (values, scales) if getattr(values, "dtype", None) in (*_BYTES, E2M1) else None


def packed(op: str, name: str, x: Any) -> jax.Array:
    """uint8 [.., d / 2] of values in any form that `parts_of` knows."""
    if x.ndim < 1 or (x.dtype == E2M1 and x.shape[-1] % 2):
        raise ValueError(f"{op}: values of {name} are {shown(x)}, need [.., d / 2] of bytes, d even.")
    x = jnp.asarray(x)
    if x.dtype == E2M1:
        return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint8)
    return lax.bitcast_convert_type(x, jnp.uint8)


def codes_of(op: str, name: str, x: Any, lead: tuple[int, ...], depth: int) -> jax.Array:
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
        f"{op}: scales of {name} are {shown(x)}, need {rule}: one for 32 numbers of a row. Quantise "
        f"it so: quantize_fp4({name})."
    )


def shown(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name} {list(x.shape)}"
    return f"a {type(x).__name__}"
