"""Casts to FP4 (e2m1) and back: int8 bytes of two numbers, the lower four bits first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize import ceil_to_ue8m0, pack_ue8m0_to_int, reference, unpack_ue8m0_from_int
from jax_deepgemm.ops.quantize.api import FLOATS
from jax_deepgemm.ops.quantize.casts import MIN_AMAX
from jax_deepgemm.ops.quantize.fp4 import decoded
from jax_deepgemm.ops.quantize.scale_layout import WORD

Pair = tuple[jax.Array, jax.Array]
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The middles between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


def per_token_cast_to_fp4(
    x: ArrayLike, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Pair:
    """FP4 values of x with one scale per row and gran_k columns.

    scale = max(amax, 1e-4) / 6 of each block, with `use_ue8m0` rounded up to a power of two; x = value *
    scale. x * (1 / scale) becomes the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to
    the smaller magnitude, and zero has no sign. `quantize_fp4` of `jax_deepgemm.indexer` rounds ties to even.

    Args:
      x: [m, n] bfloat16, float16 or float32, n even.
      use_ue8m0: scales are powers of two.
      gran_k: columns per scale; the last block may be ragged.
      use_packed_ue8m0: scales as int32 words of four UE8M0 codes, missing ones those of 1.0.

    Returns:
      (values, scales): values int8 [m, n / 2], scales [m, ceil(n / gran_k)] float32 (packed: [m,
      ceil(ceil(n / gran_k) / 4)] int32).

    Raises:
      TypeError: x is of another type.
      ValueError: x is no matrix, n is odd, use_packed_ue8m0 without use_ue8m0.

    NaN becomes zero, and infinities the largest number. Source: DeepGEMM's function of this name.

    >>> values, scales = per_token_cast_to_fp4(jnp.array([[6.0, -3.0, 0.25, 0.26]]))
    >>> values.tolist(), scales.tolist()
    ([[-41, 16]], [[1.0]])
    """
    where = "per_token_cast_to_fp4"
    if use_packed_ue8m0 and not use_ue8m0:
        raise ValueError(f"{where}: use_packed_ue8m0 packs exponents, so it needs use_ue8m0=True.")
    x = _matrix(where, x, FLOATS, "bfloat16, float16 or float32")
    if x.shape[1] % 2 or gran_k < 1:
        raise ValueError(
            f"{where}: x is {list(x.shape)} and gran_k {gran_k}; need [m, n], n even, gran_k >= 1."
        )
    wide, block = reference.exact_float32(x), (1, gran_k)
    amax = jnp.maximum(reference.block_amax(wide, block), jnp.float32(MIN_AMAX))
    scales = _sixth(amax)
    scales = ceil_to_ue8m0(scales) if use_ue8m0 else scales
    scaled = wide * reference.expand(reference.reciprocal(scales), x.shape, block)
    values = _packed(_codes(scaled))
    if use_packed_ue8m0:
        missing = -scales.shape[1] % WORD
        scales = pack_ue8m0_to_int(jnp.pad(scales, ((0, 0), (0, missing)), constant_values=1.0))
    return values, scales


def cast_back_from_fp4(
    packed: ArrayLike, sf: ArrayLike, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> jax.Array:
    """The numbers that FP4 values and their scales stand for.

    Args:
      packed: int8 (or uint8) [m, n / 2], two numbers in a byte, the lower four bits first.
      sf: [m, ceil(n / gran_k)] float32, or packed as `per_token_cast_to_fp4` does.
      gran_k: columns per scale.
      use_packed_ue8m0: whether sf are packed.

    Returns:
      float32 [m, n]: one product per element.

    Raises:
      TypeError: packed are no bytes, sf are of another type.
      ValueError: shapes that do not fit each other.

    Source: DeepGEMM's function of this name.

    >>> cast_back_from_fp4(*per_token_cast_to_fp4(jnp.array([[6.0, -3.0, 0.25, 0.26]]))).tolist()
    [[6.0, -3.0, 0.0, 0.5]]
    """
    where = "cast_back_from_fp4"
    packed = _bytes(where, packed)
    shape = packed.shape[0], 2 * packed.shape[1]
    blocks = -(-shape[1] // gran_k)
    sf = _matrix(where, sf, (np.dtype(np.int32 if use_packed_ue8m0 else np.float32),), "scales of that type")
    need = (shape[0], -(-blocks // WORD) if use_packed_ue8m0 else blocks)
    if sf.shape != need:
        raise ValueError(
            f"{where}: sf is {list(sf.shape)} for values {list(packed.shape)} and gran_k={gran_k}, need "
            f"{list(need)}."
        )
    scales = unpack_ue8m0_from_int(sf)[:, :blocks] if use_packed_ue8m0 else sf
    return decoded(packed) * reference.expand(scales, shape, (1, gran_k))


def transpose_packed_fp4(packed: ArrayLike) -> jax.Array:
    """The transposed matrix of packed FP4 numbers, packed along its own rows.

    Args:
      packed: int8 (or uint8) [m, n / 2], m even.

    Returns:
      int8 [n, m / 2].

    Raises:
      TypeError: packed are no bytes.
      ValueError: m is odd.

    Source: DeepGEMM's function of this name.

    >>> transpose_packed_fp4(jnp.array([[0x21], [0x43]], jnp.int8)).tolist() == [[0x31], [0x42]]
    True
    """
    where = "transpose_packed_fp4"
    packed = _bytes(where, packed)
    if packed.shape[0] % 2:
        raise ValueError(
            f"{where}: packed is {list(packed.shape)}, need an even number of rows. Pad it with 0."
        )
    return _packed(_unpacked(packed).T)


def _matrix(where: str, given: Any, dtypes: Any, need: str) -> jax.Array:
    x = unwrapped(given)
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype not in dtypes:
        named = getattr(getattr(x, "dtype", None), "name", type(x).__name__)
        raise TypeError(f"{where}: got {named}, need {need} ({' or '.join(one.name for one in dtypes)}).")
    if x.ndim != 2:
        raise ValueError(f"{where}: got {list(x.shape)}, need a matrix. Use jax.vmap for leading dimensions.")
    return jnp.asarray(x)


def _bytes(where: str, given: Any) -> jax.Array:
    packed = _matrix(where, given, (np.dtype(np.int8), np.dtype(np.uint8)), "bytes of two numbers each")
    return lax.bitcast_convert_type(packed, jnp.uint8)


def _sixth(amax: jax.Array) -> jax.Array:
    """amax / 6, correctly rounded, of positive normal numbers: on bits, as `reference.divide_by_fp8_max`."""
    bits = lax.bitcast_convert_type(amax, jnp.uint32)
    mantissa = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    up = jnp.where(mantissa < 3 << 22, jnp.uint32(2), jnp.uint32(1))  # so that the quotient has 24 bits
    dividend = mantissa << up
    quotient = dividend // jnp.uint32(3)
    quotient += (dividend - quotient * 3 > 1).astype(jnp.uint32)
    exponent = (bits >> 23) - up - 1
    return lax.bitcast_convert_type((exponent << 23) + (quotient - jnp.uint32(0x800000)), jnp.float32)


def _codes(x: jax.Array) -> jax.Array:
    """uint8 codes, a number each: how many of the middles lie below the magnitude, and the sign."""
    code = sum((jnp.abs(x) > middle).astype(jnp.uint8) for middle in _BETWEEN)
    return code | jnp.where((x < 0) & (code > 0), jnp.uint8(8), jnp.uint8(0))


def _packed(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes[:, ::2] | codes[:, 1::2] << 4, jnp.int8)


def _unpacked(packed: jax.Array) -> jax.Array:
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
