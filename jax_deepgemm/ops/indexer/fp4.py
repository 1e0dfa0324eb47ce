"""Rows of FP4 as an indexer reads them: they become rows of e4m3.

    e2m1 * 2**(code - 127)  =  e4m3 * 2**(base - 127)        base = largest code of the row - 6

e4m3 holds every number of e2m1 times 2**-8 to 2**6. So a row of which no block's scale is more than 2**14
times smaller than another's becomes one of e4m3 with one scale without any rounding. Where blocks lie further
apart, numbers of the smaller ones become multiples of 2**-15 times the largest scale, rounded to even.
include/jax_deepgemm/indexer/expand.cuh does the same.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.indexer.family import DEPTHS
from jax_deepgemm.ops.quantize.fp4 import (
    BIAS,
    BLOCK,
    MAGNITUDES,
    MANTISSA,
    NAN,
    WORD,
    codes_of,
    decoded,
    packed,
    parts_of,
    shown,
)

LARGEST_SHIFT = 6
"""6 * 2**6 is e4m3's largest number that is one of e2m1 times a power of two."""
_BYTES = np.dtype(np.uint8)


def expand(values: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as e4m3 [.., d], and their scales, float32 [..], of bytes [.., d / 2] and words [..].

    >>> q = jnp.full((1, 16), 0x42, jnp.uint8), jnp.full(1, 127, jnp.int32)
    >>> values, scales = expand(*q)
    >>> values[0, :3].tolist(), scales.tolist()
    ([64.0, 128.0, 64.0], [0.015625])
    """
    numbers = decoded(values)
    blocks = numbers.reshape(*values.shape[:-1], -1, BLOCK)
    codes = lax.bitcast_convert_type(words, jnp.uint8)[..., : blocks.shape[-2]].astype(jnp.int32)
    counts = jnp.any(values.reshape(*codes.shape, BLOCK // 2) & MAGNITUDES != 0, axis=-1)
    each = jnp.where(counts, codes, 0)
    largest = functools.reduce(jnp.maximum, [each[..., i] for i in range(codes.shape[-1])])
    base = jnp.maximum(largest - LARGEST_SHIFT, 1)
    shift = jnp.clip(codes - base[..., None], -40, LARGEST_SHIFT)
    factors = lax.bitcast_convert_type((shift + BIAS) << MANTISSA, jnp.float32)
    expanded = (blocks * factors[..., None]).astype(jnp.float8_e4m3fn).reshape(numbers.shape)
    scales = lax.bitcast_convert_type(base << MANTISSA, jnp.float32)
    nan = functools.reduce(jnp.logical_or, [codes[..., i] == NAN for i in range(codes.shape[-1])])
    return expanded, jnp.where(nan, jnp.nan, scales)


def is_packed(keys: Any) -> bool:
    """Whether an array of keys is bytes of FP4."""
    return bool(keys.dtype == _BYTES)


# Operands --------------------------------------------------------------------------------------------------


def is_fp4(x: Any) -> bool:
    """Whether an operand is values and scales, the values FP4 or bytes."""
    return parts_of(x) is not None


def fp4_operand(op: str, name: str, x: Any, rank: str) -> tuple[jax.Array, jax.Array]:
    """Bytes [.., d / 2] and words of scales [..] of an FP4 operand of d 32, 64 or 128.

    Args:
      op, name: for errors.
      x: for which `is_fp4`.
      rank: of the operand, such as "[n, d]".
    """
    parts = parts_of(x)
    assert parts is not None
    values = packed(op, name, parts[0])
    depth = 2 * values.shape[-1]
    if values.ndim != rank.count(",") + 1:
        raise ValueError(
            f"{op}: values of {name} are {shown(parts[0])}, need {rank.replace('d]', 'd / 2]')} of "
            f"bytes, or {rank} of float4_e2m1fn. Use jax.vmap for leading batch dimensions."
        )
    if depth not in DEPTHS:
        raise ValueError(
            f"{op}: values of {name} are {shown(parts[0])}: d is {depth}, need one of "
            f"{', '.join(map(str, DEPTHS))}. Pad q and kv with zeros, which changes no logit."
        )
    return values, _words(codes_of(op, name, parts[1], values.shape[:-1], depth))


def _words(codes: jax.Array) -> jax.Array:
    """int32 [..] of codes [.., d / 32]; of those that a row has not, 2**0."""
    missing = WORD - codes.shape[-1]
    padded = jnp.pad(codes, ((0, 0),) * (codes.ndim - 1) + ((0, missing),), constant_values=BIAS)
    return lax.bitcast_convert_type(padded, jnp.int32)
