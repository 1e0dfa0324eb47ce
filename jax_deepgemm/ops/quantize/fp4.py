"""FP4: numbers of e2m1, two of them in a byte, in one of two formats.

MXFP4   a scale of UE8M0 for every 32 of a row       element = e2m1 * 2**(code - 127)
NVFP4   one of e4m3 for every 16, and a float32      element = e2m1 * scale * global scale
        for the whole matrix
"""

from __future__ import annotations

import dataclasses
import functools
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
NVFP4_BLOCK = 16
"""Of NVFP4."""
WORD = 4
"""Scales of an int32, those of a row of 128."""
NAN = 255
"""The code of NaN."""
BIAS, MANTISSA = 127, 23
MAGNITUDES = 0x77
"""The bits of a byte that are no signs."""
_MIN_AMAX, _LARGEST = 1e-4, 6.0
_SCALES, _WORDS, E4M3 = np.dtype(jnp.float8_e8m0fnu), np.dtype(np.int32), np.dtype(jnp.float8_e4m3fn)
_LARGEST_SCALE, _SMALLEST_SCALE = 448.0, 2.0**-9
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fp4Array:
    """FP4 numbers with a scale of every 32 of a row (MXFP4), or of every 16 (NVFP4): element = value * scale
    of its block, in NVFP4 times the global scale of its matrix. A pytree.

    >>> q = quantize_fp4(jnp.ones((3, 5, 64)))
    >>> q.shape, q.values.shape, q.scales.shape
    ((3, 5, 64), (3, 5, 32), (3, 5, 2))
    >>> q[1].shape
    (5, 64)
    >>> from jax_deepgemm import quantize
    >>> nvfp4 = quantize(jnp.ones((3, 5, 64)), (1, 16), jnp.float4_e2m1fn)
    >>> nvfp4.scales.shape, nvfp4.scales.dtype.name, nvfp4.global_scale.shape
    ((3, 5, 4), 'float8_e4m3fn', (3,))

    Attributes:
      values: uint8 [.., d / 2], two numbers of e2m1 in a byte, the lower four bits first. int8 bytes of other
        libraries, and float4_e2m1fn [.., d], are taken as well.
      scales: float8_e8m0fnu [.., d / 32]; in an indexer's operands also int32 [..], four of them in a word,
        the lowest byte first. Of NVFP4 float8_e4m3fn [.., d / 16].
      global_scale: of NVFP4 float32 [..], one for a matrix of the last two dimensions; or None, for 1.

    An index is one of leading dimensions, where there is a global scale of those in front of the matrices. It
    unpacks as (values, scales), or (values, scales, global_scale). Raises nothing; what it holds is checked
    by the functions that take it.
    """

    values: jax.Array
    scales: jax.Array
    global_scale: jax.Array | None = None

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
          IndexError: an index of the last dimension, which scales have blocks of, or of rows of a matrix that
            has a global scale.
        """
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(part is not None for part in parts)
        if any(part is Ellipsis or getattr(part, "dtype", None) == np.bool_ for part in parts):
            used = self.ndim
        leading = self.ndim - (1 if self.global_scale is None else 2)
        if used > leading:
            raise IndexError(
                f"Fp4Array: index {index!r} of numbers {list(self.shape)}: only the {leading} leading "
                "dimensions can be indexed (no Ellipsis, no masks). Index .values and .scales for others."
            )
        whole = None if self.global_scale is None else self.global_scale[index]
        return Fp4Array(self.values[index], self.scales[index], whole)

    def __iter__(self) -> Iterator[jax.Array]:
        whole = () if self.global_scale is None else (self.global_scale,)
        return iter((self.values, self.scales, *whole))


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
    return _encode(_blocks(where, x, BLOCK, 1), min_amax)


@functools.partial(jax.jit, static_argnames="min_amax", inline=True)
def _encode(blocks: jax.Array, min_amax: float) -> Fp4Array:
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = ceil_to_ue8m0(jnp.maximum(amax, max(min_amax, _LARGEST * SMALLEST_NORMAL)) / _LARGEST)
    values = _encoded(blocks / scale)
    exponent = lax.bitcast_convert_type(scale[..., 0], jnp.uint32) >> MANTISSA
    exponent = jnp.where(jnp.isfinite(amax[..., 0]), exponent, NAN)
    return Fp4Array(values, lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu))


def encode_nvfp4(where: str, x: Any, min_amax: float = 0.0) -> Fp4Array:
    """x [.., rows, d] in NVFP4, as NVIDIA's ModelOpt (nvfp4_tensor.py) makes it of a weight:

        global scale = amax of the matrix / (6 * 448)
        scale        = e4m3(amax of the block / 6 / global scale), at least 2**-9; 1 of a block of zeros
        value        = e2m1(x / (scale * global scale)), ties to even

    where: for errors. A matrix of zeros has global scale 1. Infinities and NaN make their block NaN, and do
    not count elsewhere.
    """
    return _encode_nvfp4(_blocks(where, x, NVFP4_BLOCK, 2), min_amax)


@functools.partial(jax.jit, static_argnames="min_amax", inline=True)
def _encode_nvfp4(blocks: jax.Array, min_amax: float) -> Fp4Array:
    finite = jnp.isfinite(blocks)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, where=finite, initial=0), min_amax)
    most = jnp.max(amax, axis=(-1, -2), initial=0)
    smallest = jnp.maximum(most / (_LARGEST * _LARGEST_SCALE), SMALLEST_NORMAL)
    whole = jnp.where(most > 0, smallest, 1).astype(jnp.float32)
    wanted = amax / _LARGEST / whole[..., None, None]
    scale = jnp.where(amax > 0, jnp.clip(wanted, _SMALLEST_SCALE, _LARGEST_SCALE), 1)
    scale = jnp.where(jnp.all(finite, axis=-1), scale, jnp.nan).astype(E4M3)
    step = scale.astype(jnp.float32) * whole[..., None, None]
    return Fp4Array(_encoded(blocks / step[..., None]), scale, whole)


def _blocks(where: str, x: Any, size: int, rank: int) -> jax.Array:
    """float32 [.., d / size, size] of x [.., d], which has `rank` dimensions at least."""
    x, dims = unwrapped(x), "[.., d]" if rank < 2 else "[.., rows, d]"
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where}: x is {shown(x)}, need a floating-point array {dims}.")
    if x.ndim < rank or x.shape[-1] % size:
        raise ValueError(f"{where}: x is {shown(x)}, need {dims}, d a multiple of {size}: pad it with zeros.")
    return lax.stop_gradient(jnp.asarray(x).astype(jnp.float32)).reshape(
        *x.shape[:-1], x.shape[-1] // size, size
    )


def _encoded(x: jax.Array) -> jax.Array:
    """Bytes [.., d / 2] of x [.., blocks, numbers] in e2m1, nearest, ties to even: a code is how many of the
    numbers between those of e2m1 x is beyond."""
    a = jnp.abs(x)
    beyond = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5)
    code = sum(one.astype(jnp.uint8) for one in beyond)
    codes = code | jnp.where((x < 0) & (code > 0), 8, 0).astype(jnp.uint8)
    codes = codes.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return codes[..., ::2] | codes[..., 1::2] << 4


def dequantize_fp4(q: Fp4Array | tuple[ArrayLike, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The numbers that FP4 stands for.

    >>> dequantize_fp4(quantize_fp4(jnp.full(32, 0.75)))[:3].tolist()
    [0.75, 0.75, 0.75]

    Args:
      q: an `Fp4Array`, or its parts, as (values [.., d / 2], scales [.., d / 32]).
      dtype: of the result.

    Returns:
      [.., d] in `dtype`. bfloat16 holds all numbers of MXFP4, and those of NVFP4 without a global scale,
      whose product with it is rounded to float32 and then to `dtype`.

    Raises:
      TypeError, ValueError: values and scales that are no FP4, or do not fit each other.
    """
    nvfp4 = nvfp4_parts(q)
    if nvfp4 is not None:
        values, of_blocks, whole = checked_nvfp4("dequantize_fp4", "q", nvfp4)
        return (nvfp4_numbers(values, of_blocks) * whole[..., None, None]).astype(dtype)
    parts = parts_of(q)
    if parts is None:
        raise TypeError(
            f"dequantize_fp4: q is {shown(q)}, need an Fp4Array, or (values, scales). Of a PreparedFp4 w "
            "that is w.fp4(k)."
        )
    values = packed("dequantize_fp4", "q", parts[0])
    depth = 2 * values.shape[-1]
    codes = codes_of("dequantize_fp4", "q", parts[1], values.shape[:-1], depth)
    scales = lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu).astype(jnp.float32)
    numbers = decoded(values).reshape(*codes.shape, BLOCK) * scales[..., None]
    return numbers.reshape(*values.shape[:-1], depth).astype(dtype)


@functools.partial(jax.jit, inline=True)
def decoded(values: jax.Array) -> jax.Array:
    """float32 [.., d] of bytes [.., d / 2]."""
    codes = jnp.stack([values & 15, values >> 4], axis=-1).astype(jnp.int32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    magnitude = 0.5 * halves.astype(jnp.float32)
    numbers = jnp.where(codes & 8 != 0, -magnitude, magnitude)
    return numbers.reshape(*values.shape[:-1], 2 * values.shape[-1])


def nvfp4_numbers(values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 [.., d] of bytes [.., d / 2] times scales of e4m3 [.., d / 16]: exact, in bfloat16 too."""
    numbers = decoded(values).reshape(*scales.shape, NVFP4_BLOCK) * scales.astype(jnp.float32)[..., None]
    return numbers.reshape(*values.shape[:-1], 2 * values.shape[-1])


# Operands --------------------------------------------------------------------------------------------------


def parts_of(x: Any) -> tuple[Any, Any] | None:
    """Values and scales of an operand whose values are FP4 or bytes; None of another.

    Raises:
      TypeError: an Fp4Array of MXFP4 with a global scale, which only NVFP4 has.
    """
    if isinstance(x, Fp4Array) and x.global_scale is not None and nvfp4_parts(x) is None:
        raise TypeError(
            f"an Fp4Array has scales {shown(x.scales)} and a global_scale, which only NVFP4 has: scales of "
            "float8_e4m3fn for 16 numbers. Multiply the scales, or the product, by it."
        )
    pair = (x.values, x.scales) if isinstance(x, Fp4Array) else x
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return None
    values, scales = map(unwrapped, pair)
    return (values, scales) if getattr(values, "dtype", None) in (*_BYTES, E2M1) else None


def nvfp4_parts(x: Any) -> tuple[Any, Any, Any] | None:
    """Values, scales and the global scale, or None for 1, of an operand in NVFP4; None of another."""
    given = tuple(x) if isinstance(x, Fp4Array | list) else x
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        return None
    values, scales, whole = map(unwrapped, (*given, None)[:3])
    bytes_or_numbers = getattr(values, "dtype", None) in (*_BYTES, E2M1)
    return (values, scales, whole) if bytes_or_numbers and getattr(scales, "dtype", None) == E4M3 else None


def checked_nvfp4(where: str, name: str, parts: tuple[Any, Any, Any]) -> tuple[jax.Array, ...]:
    """Bytes [.., n, d / 2], scales [.., n, d / 16] and global scales [..] of what `nvfp4_parts` found."""
    values, scales = packed(where, name, parts[0]), jnp.asarray(parts[1])
    depth = 2 * values.shape[-1]
    if values.ndim < 2 or depth % NVFP4_BLOCK or scales.shape != (*values.shape[:-1], depth // NVFP4_BLOCK):
        raise ValueError(
            f"{where}: values of {name} are {shown(parts[0])} and scales {shown(scales)}, need bytes [.., n, "
            "d / 2] and [.., n, d / 16], d a multiple of 16: a scale of e4m3 for 16 numbers of a row."
        )
    lead = values.shape[:-2]
    whole = jnp.ones(lead, jnp.float32) if parts[2] is None else parts[2]
    if not hasattr(whole, "dtype") or whole.dtype != np.float32 or whole.shape not in (lead, (*lead, 1)):
        raise (TypeError if getattr(whole, "dtype", None) != np.float32 else ValueError)(
            f"{where}: global_scale of {name} is {shown(whole)} for values {shown(parts[0])}, need float32 "
            f"{list(lead)}: one for each matrix of the last two dimensions."
        )
    return values, scales, jnp.asarray(whole).reshape(lead)


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
