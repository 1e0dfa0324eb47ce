"""FP4 weights as the mixed products read them: slabs of 64 rows by 128 of k, in the order of their fragments.

Bytes of a slab, for products with float8_e4m3fn (include/jax_deepgemm/mixed/ reads them):

    0 .. 4095       words, uint32 with the lowest byte first: word (h * 128 + (t ^ g // 2)) * 4 + j is of
                    thread t, the half h and the group j of 32 numbers. With t = 32 w + 4 g + q it has
                    eight numbers of row 16 w + 8 h + g: k = 32 j + 4 q + i, and k = 32 j + 16 + 4 q + i,
                    i = 0 .. 3.
                    Because of the exclusive or, eight rows' words of one q lie on all banks.
                    Magnitudes of the former are in bits 4 i .., of the latter in bits 16 + 4 i ..;
                    signs of the former in bit 8 i + 7, of the latter in bit 8 i + 3.
    4096 .. 4351    exponents e, one a byte: byte ((w * 8 + g) * 2 + h) * 4 + j is of group j of that row
    4352 .. 4355    float32 base
    4356 .. 4367    zeros

    number = e2m1 * 2**(e - 6) * base        base = 2**(largest code - 127 - 6), e = code - largest code + 12

The largest code is that of the slab's groups that have a number other than zero; of others e is 1. For e from
1 to 12, e2m1 * 2**(e - 6) is a normal number of e4m3, so nothing is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.quantize.fp4 import BIAS, BLOCK, MAGNITUDES, MANTISSA, NAN, decoded

ROWS, COLUMNS, BYTES = 64, 128, 4368
_WORDS, _EXPONENTS, _BASE = 4096, 256, 4
LARGEST, SMALLEST = 12, 1
"""Exponents of a slab."""
LARGEST_SHIFT = 6
"""6 * 2**6 is e4m3's largest number that is one of e2m1 times a power of two."""
_MAGNITUDES = 0x7777
_LEAST_SHIFT = -40  # far below what e4m3 has


def fold(values: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slabs uint8 [.., n / 64, ceil(k / 128), BYTES], and for each by how much its largest code exceeds its
    smallest one, int32.

    Args:
      values: uint8 [.., n, k / 2], n a multiple of 64.
      codes: uint8 [.., n, k / 32].

    The base is NaN where the codes are too far apart, or one of them is that of NaN.
    """
    *lead, n, half = values.shape
    across = -(-2 * half // COLUMNS)
    values, codes = (padded(x, across * step) for x, step in ((values, COLUMNS // 2), (codes, 4)))
    pairs = values.reshape(*lead, n // ROWS, 4, 2, 8, across, 4, 2, 4, 2)
    words = words_of(pairs, len(lead))
    each = codes.reshape(*lead, n // ROWS, 4, 2, 8, across, 4).astype(jnp.int32)
    counts = jnp.any(pairs & MAGNITUDES != 0, axis=(-1, -2, -3)) & (each != NAN)
    some = [len(lead) + i for i in (1, 2, 3, 5)]
    largest = jnp.max(jnp.where(counts, each, -1), axis=some, keepdims=True)
    apart = jnp.max(jnp.where(counts, largest - each, 0), axis=some)
    exponents = jnp.where(counts, jnp.clip(each - largest + LARGEST, SMALLEST, LARGEST), SMALLEST)
    exponents = ordered(exponents.astype(jnp.uint8), len(lead), "Nwhgkj", "Nkwghj")
    base = jnp.where(largest < 0, 1.0, power_of_two(largest - LARGEST_SHIFT)).reshape(apart.shape)
    wrong = jnp.any(each == NAN, axis=some) | (apart > LARGEST - SMALLEST)
    base = lax.bitcast_convert_type(jnp.where(wrong, jnp.nan, base).astype(jnp.float32), jnp.uint8)
    words = lax.bitcast_convert_type(words, jnp.uint8)
    parts = [words.reshape(*apart.shape, _WORDS), exponents.reshape(*apart.shape, _EXPONENTS), base]
    left = jnp.zeros((*apart.shape, BYTES - _WORDS - _EXPONENTS - _BASE), jnp.uint8)
    return jnp.concatenate([*parts, left], axis=-1), apart


@functools.partial(jax.jit, inline=True)
def unfold(slabs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values uint8 [.., n, k / 2] and codes uint8 [.., n, k / 32] of slabs, k a multiple of 128.

    Numbers and their scales are those that were folded. Codes of groups of zeros are others; all of a slab
    whose base is NaN are those of NaN.
    """
    *lead, down, across, _ = slabs.shape
    values = words_to_pairs(slabs[..., :_WORDS], len(lead))
    exponents = slabs[..., _WORDS : _WORDS + _EXPONENTS].reshape(*lead, down, across, 4, 8, 2, 4)
    base = lax.bitcast_convert_type(slabs[..., _WORDS + _EXPONENTS :][..., :_BASE], jnp.uint32)
    biased = jnp.where(base >> MANTISSA > 0, base >> MANTISSA, 9 - lax.clz(base)).astype(jnp.int32)
    biased = biased[..., None, None, None, None]
    codes = jnp.clip(biased + exponents.astype(jnp.int32) + (LARGEST_SHIFT - LARGEST), 0, NAN - 1)
    codes = ordered(jnp.where(biased == NAN, NAN, codes).astype(jnp.uint8), len(lead), "Nkwghj", "Nwhgkj")
    n = down * ROWS
    return values.reshape(*lead, n, across * COLUMNS // 2), codes.reshape(*lead, n, across * 4)


def expand(values: jax.Array, codes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """e4m3 [.., n, k] and float32 scales [.., ceil(n / rows), ceil(k / 128)] of values and codes.

    Exact where the codes that count of a block are at most 14 apart; numbers of smaller groups are rounded to
    multiples of 2**-15 times the largest scale. The scale is NaN where a code of its block is.
    """
    *lead, n, groups = codes.shape
    down, across = -(-n // rows), -(-groups // 4)
    counts = jnp.any(values.reshape(*lead, n, groups, BLOCK // 2) & MAGNITUDES != 0, axis=-1)
    each = codes.astype(jnp.int32)
    widths = ((0, 0),) * len(lead) + ((0, down * rows - n), (0, across * 4 - groups))
    blocks = jnp.pad(jnp.where(counts | (each == NAN), each, -1), widths, constant_values=-1)
    largest = jnp.max(blocks.reshape(*lead, down, rows, across, 4), axis=(-1, -3))
    base = jnp.where(largest < 0, BIAS, largest - LARGEST_SHIFT)
    repeated = jnp.repeat(jnp.repeat(base, rows, axis=-2)[..., :n, :], 4, axis=-1)[..., :groups]
    shift = jnp.clip(each - repeated, _LEAST_SHIFT, LARGEST_SHIFT)
    numbers = decoded(values).reshape(*lead, n, groups, BLOCK) * power_of_two(shift + BIAS)[..., None]
    scales = jnp.where(largest == NAN, jnp.nan, power_of_two(base)).astype(jnp.float32)
    return numbers.reshape(*lead, n, groups * BLOCK).astype(jnp.float8_e4m3fn), scales


def power_of_two(biased: jax.Array) -> jax.Array:
    """float32 2**(biased - 127) of int32 from -22 on, subnormal numbers too."""
    normal, below = jnp.clip(biased, 1, 2 * BIAS) << MANTISSA, 1 << jnp.clip(MANTISSA - 1 + biased, 0, 22)
    return lax.bitcast_convert_type(jnp.where(biased > 0, normal, below), jnp.float32)


def words_of(pairs: jax.Array, lead: int) -> jax.Array:
    """Words in the order of a slab, of bytes [.., n / 64, w, h, g, k / 128, j, lower or upper, q, 2]."""
    quads = _quads(pairs)
    lower, upper = quads[..., 0, :], quads[..., 1, :]
    words = lower & _MAGNITUDES | (upper & _MAGNITUDES) << 16 | _spread(lower) << 4 | _spread(upper)
    return _on_all_banks(ordered(words, lead, "Nwhgkjq", "Nkhwgqj"))


def words_to_pairs(words: jax.Array, lead: int) -> jax.Array:
    """The inverse, of uint8 [.., n / 64, k / 128, 4096]."""
    words = lax.bitcast_convert_type(words.reshape(*words.shape[:-1], 2, 4, 8, 4, 4, 4), jnp.uint32)
    words = _on_all_banks(words)
    lower = words & _MAGNITUDES | _gathered(words >> 4)
    upper = words >> 16 & _MAGNITUDES | _gathered(words)
    quads = ordered(jnp.stack([lower, upper], axis=-1), lead, "Nkhwgqju", "Nwhgkjuq")
    return lax.bitcast_convert_type(quads.astype(jnp.uint16), jnp.uint8)


def _on_all_banks(words: jax.Array) -> jax.Array:
    """Words [.., g, q, j] with q at q ^ g // 2, or back."""
    g = np.arange(8)[:, None]
    return words[..., g, np.arange(4) ^ g // 2, :]


def padded(x: jax.Array, columns: int) -> jax.Array:
    """With zeros behind the last dimension."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, columns - x.shape[-1]),))


def _quads(pairs: jax.Array) -> jax.Array:
    """uint32 of two bytes: four numbers of four bits, the first in the lowest."""
    low, high = (pairs[..., i].astype(jnp.uint32) for i in range(2))
    return low | high << 8


def _spread(quads: jax.Array) -> jax.Array:
    """Signs, bits 4 i + 3, to bits 8 i + 3."""
    return functools.reduce(jnp.bitwise_or, [(quads & (8 << 4 * i)) << 4 * i for i in range(4)])


def _gathered(words: jax.Array) -> jax.Array:
    """The inverse of `_spread`."""
    return functools.reduce(jnp.bitwise_or, [words >> 4 * i & (8 << 4 * i) for i in range(4)])


def ordered(x: jax.Array, lead: int, given: Sequence[str], wanted: Sequence[str]) -> jax.Array:
    """x, whose dimensions behind the leading ones are named, in another order."""
    return jnp.transpose(x, (*range(lead), *(lead + given.index(name) for name in wanted)))
