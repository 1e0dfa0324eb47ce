"""NVFP4 weights as the mixed products read them: slabs of 64 rows by 128 of k, in the order of their
fragments.

Bytes of a slab, for products with bfloat16 (include/jax_deepgemm/mixed/nvfp4_loop.cuh reads them):

    0 .. 4095       words as in slabs.py, of other numbers: word (h * 128 + (t ^ g // 2)) * 4 + j of thread
                    t = 32 w + 4 g + q has eight numbers of row 16 w + 8 h + g: k = 32 j + 2 q + {0, 1, 8, 9},
                    and 16 more
    4096 .. 4607    codes c of scales, one a byte: byte ((i * 32 + w * 8 + g) * 2 + h) * 4 + s is that of k
                    from 64 i + 16 s on, of that row
    4608 .. 4611    float32 global scale of the matrix
    4612 .. 4623    zeros

    number = e2m1 * (1 + c % 8 / 8) * 2**(c // 8 - 9) * global scale          c is 159 where the scale is NaN

Scales of e4m3 are seven bits and a sign. c has one bit of exponent more, so that subnormal numbers are no
special case for the kernel; a scale of zero is 2**-9 with zeros for numbers, and signs of scales are those of
numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.ops.quantize.fp4 import E4M3, NVFP4_BLOCK
from jax_deepgemm.ops.quantize.slabs import COLUMNS, ROWS, ordered, padded, words_of, words_to_pairs

BYTES = 4624
_WORDS, _SCALES, _WHOLE = 4096, 512, 4
_OF_ROW = COLUMNS // NVFP4_BLOCK
_SIGNS = 0x88
_SHIFT, _NAN = 20, 159
_LOWEST = (127 - 9) << 3
"""Sign, exponent and three bits of mantissa of float32 2**-9."""


def fold(values: jax.Array, scales: jax.Array, whole: jax.Array) -> jax.Array:
    """Slabs uint8 [.., n / 64, ceil(k / 128), BYTES].

    Args:
      values: uint8 [.., n, k / 2], n a multiple of 64.
      scales: float8_e4m3fn [.., n, k / 16].
      whole: float32 [..], global scales.
    """
    *lead, n, half = values.shape
    across = -(-2 * half // COLUMNS)
    bits = lax.bitcast_convert_type(scales, jnp.uint8)
    values ^= jnp.repeat(jnp.where(bits >= 128, _SIGNS, 0).astype(jnp.uint8), NVFP4_BLOCK // 2, axis=-1)
    values &= jnp.repeat(jnp.where(bits & 127 == 0, _SIGNS, 255).astype(jnp.uint8), NVFP4_BLOCK // 2, axis=-1)
    values, codes = padded(values, across * COLUMNS // 2), padded(_codes(bits), across * _OF_ROW)
    pairs = values.reshape(*lead, n // ROWS, 4, 2, 8, across, 4, 2, 2, 4).swapaxes(-1, -2)
    words = lax.bitcast_convert_type(words_of(pairs, len(lead)), jnp.uint8)
    codes = codes.reshape(*lead, n // ROWS, 4, 2, 8, across, 2, 4)
    codes = ordered(codes, len(lead), "Nwhgkis", "Nkiwghs")
    slabs = (*lead, n // ROWS, across)
    last = lax.bitcast_convert_type(whole, jnp.uint8)[..., None, None, :]
    parts = [words.reshape(*slabs, _WORDS), codes.reshape(*slabs, _SCALES)]
    parts += [jnp.broadcast_to(last, (*slabs, _WHOLE))]
    return jnp.concatenate([*parts, jnp.zeros((*slabs, BYTES - _WORDS - _SCALES - _WHOLE), jnp.uint8)], -1)


@functools.partial(jax.jit, inline=True)
def unfold(slabs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values uint8 [.., n, k / 2], scales float8_e4m3fn [.., n, k / 16] and global scales float32 [.., n /
    64, k / 128] of slabs, k a multiple of 128.

    Numbers are those that were folded, and scales too but zeros and negative ones.
    """
    *lead, down, across, _ = slabs.shape
    n = down * ROWS
    pairs = words_to_pairs(slabs[..., :_WORDS], len(lead)).swapaxes(-1, -2)
    codes = slabs[..., _WORDS : _WORDS + _SCALES].reshape(*lead, down, across, 2, 4, 8, 2, 4)
    codes = ordered(codes, len(lead), "Nkiwghs", "Nwhgkis").astype(jnp.uint32)
    scales = lax.bitcast_convert_type((codes + _LOWEST) << _SHIFT, jnp.float32)
    scales = jnp.where(codes == _NAN, jnp.nan, scales).astype(E4M3)
    whole = lax.bitcast_convert_type(slabs[..., _WORDS + _SCALES :][..., :_WHOLE], jnp.float32)
    values = pairs.reshape(*lead, n, across * COLUMNS // 2)
    return values, scales.reshape(*lead, n, across * _OF_ROW), whole


def _codes(bits: jax.Array) -> jax.Array:
    """uint8 of the magnitudes of scales; of zeros that of the smallest number."""
    magnitudes = lax.bitcast_convert_type(bits & 127, E4M3).astype(jnp.float32)
    top = lax.bitcast_convert_type(magnitudes, jnp.int32) >> _SHIFT
    return jnp.clip(top - _LOWEST, 0, _NAN).astype(jnp.uint8)
