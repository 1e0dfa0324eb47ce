"""Numbers of four and six bits in bytes, along the last dimension.

    int4        two in a byte, the first in its low half
    fp6_e3m2    four in three bytes: bits 6 i .. 6 i + 5 of the 24 bits, of which the first byte is the lowest

fp6_e3m2: a sign, three bits of exponent e with bias 3, two of mantissa m: (4 + m) 2^(e - 5), and m / 16 where
e is 0. There are no infinities and no NaN: the largest number is 28.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_FP6 = 28.0


def pack_int4(values: jax.Array) -> jax.Array:
    """uint8 [.., n / 2] of integers [.., n] in -8 .. 7."""
    pairs = (values.astype(jnp.int32) & 15).reshape(*values.shape[:-1], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).astype(jnp.uint8)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """int32 [.., n] of uint8 [.., n / 2]."""
    both = packed.astype(jnp.int32)[..., None] >> jnp.array([0, 4], jnp.int32).reshape(
        (1,) * packed.ndim + (2,)
    )
    return (((both & 15) ^ 8) - 8).reshape(*packed.shape[:-1], -1)


def encode_fp6(numbers: jax.Array) -> jax.Array:
    """int32 codes of float32 numbers of at most 28: the nearest, of two the even one."""
    size = jnp.abs(numbers)
    exponent = jnp.maximum((lax.bitcast_convert_type(size, jnp.int32) >> 23) - 127, -2)
    steps = jnp.round(size / _power(exponent - 2)).astype(jnp.int32)
    return 4 * (exponent + 2) + steps + jnp.where(jnp.signbit(numbers), 32, 0).astype(jnp.int32)


def decode_fp6(codes: jax.Array) -> jax.Array:
    """float32 numbers of codes 0 .. 63."""
    exponent, mantissa = (codes >> 2) & 7, (codes & 3).astype(jnp.float32)
    size = jnp.where(exponent == 0, mantissa / 16, (4 + mantissa) * _power(exponent - 5))
    return jnp.where(codes >= 32, -size, size)


def pack_fp6(codes: jax.Array) -> jax.Array:
    """uint8 [.., 3 n / 4] of codes [.., n]."""
    four = codes.reshape(*codes.shape[:-1], -1, 4)
    word = sum((four[..., i] << (6 * i) for i in range(1, 4)), four[..., 0])
    return (
        jnp.stack([(word >> (8 * i)) & 255 for i in range(3)], -1)
        .reshape(*codes.shape[:-1], -1)
        .astype(jnp.uint8)
    )


def unpack_fp6(packed: jax.Array) -> jax.Array:
    """int32 codes [.., n] of uint8 [.., 3 n / 4]."""
    three = packed.astype(jnp.int32).reshape(*packed.shape[:-1], -1, 3)
    word = sum((three[..., i] << (8 * i) for i in range(1, 3)), three[..., 0])
    return jnp.stack([(word >> (6 * i)) & 63 for i in range(4)], -1).reshape(*packed.shape[:-1], -1)


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
