"""Weights in int8, int4 or FP6 with a scale for each output channel, or for a group of the sum in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.inference import checks, packing
from jax_deepgemm.ops.quantize.per_channel import PerChannelArray

FORMATS = {"int8": 8, "int4": 4, "fp6_e3m2": 6}
"""What values are, and how many bits each takes."""
_STORED = {"int8": jnp.int8, "int4": jnp.uint8, "fp6_e3m2": jnp.uint8}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [.., k, n] in fewer bits: element = value * scale of its group of rows and its column.

    >>> import jax, jax.numpy as jnp
    >>> w = quantize(jnp.array([[1.0, -4.0], [0.5, 3.0]]), "int4")
    >>> w.shape, w.bits, w.values.shape, w.scales.tolist()
    ((2, 2), 4, (2, 1), [[0.125, 0.5]])
    >>> dequantize(w).tolist()                       # of 8 steps below zero there are only 7 above
    [[0.875, -4.0], [0.5, 3.0]]
    >>> [leaf.dtype.name for leaf in jax.tree.leaves(w)]
    ['uint8', 'float32']

    A pytree of two arrays, so that it passes through `jax.jit`, can be sharded, and is saved and loaded like
    any other parameter. `linear`, `norm_linear`, `mlp` and `grouped_linear` take it.

    Attributes:
      values: int8 [.., k, n]; int4: uint8 [.., k, n / 2], two in a byte, the first in its low half; fp6_e3m2:
        uint8 [.., k, 3 n / 4], four in three bytes, the first in the lowest bits.
      scales: float32 [.., groups, n]: group i has the rows i k / groups .. (i + 1) k / groups - 1.
      format: "int8", "int4" or "fp6_e3m2".

    Raises nothing; what it holds is checked by the functions that take it.
    """

    values: jax.Array
    scales: jax.Array
    format: str = field(default="int8", metadata={"static": True})

    @property
    def bits(self) -> int:
        """Of a value."""
        return FORMATS[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, [.., k, n]."""
        *lead, stored = self.values.shape
        return (*lead, stored * 8 // self.bits)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


def quantize(w: ArrayLike, format: str = "int8", *, group_size: int | None = None) -> QuantizedWeight:
    """A weight [.., k, n] in int8, int4 or FP6, with a scale for each column, or for group_size rows of each.

        int8, int4    scale = largest magnitude / 2^(bits - 1)
                      value = round(w / scale), at most 2^(bits - 1) - 1
        fp6_e3m2      scale = largest magnitude / 28
                      value = the nearest number with three bits of exponent and two of mantissa

    >>> import jax.numpy as jnp
    >>> quantize(jnp.array([[2.0, 0.0], [-1.0, 0.0]])).values.tolist()
    [[127, 0], [-64, 0]]
    >>> quantize(jnp.ones((64, 8)), "fp6_e3m2", group_size=16).scales.shape
    (4, 8)

    Args:
      w: [.., k, n] bfloat16, float16 or float32. For int4 n is even, for fp6_e3m2 a multiple of 4.
      format: "int8", "int4" or "fp6_e3m2".
      group_size: rows that share a scale, a divisor of k; None: k.

    Returns:
      A `QuantizedWeight`. Halves are rounded to the even number. A group of zeros has scale 0, and is zeros.

    Raises:
      TypeError, ValueError: types and sizes that do not fit.

    Has no derivative. Source: DeepSpeed's GroupQuantizer and symmetric_quantize; FP6: Xia et al.,
    arXiv:2401.14112. `jax_deepgemm.quantize` makes FP8 blocks, and `jax_deepgemm.quantize_per_channel` int8
    with scales of largest magnitude / 127; `linear` takes those too.
    """
    op = "quantize"
    bits = FORMATS[checks.choice(op, "format", format, tuple(FORMATS))]
    given = checks.floats(op, "w", w)
    if given.ndim < 2:
        raise ValueError(f"{op}: w is {list(given.shape)}, need [.., k, n].")
    *lead, k, n = given.shape
    if n * bits % (24 if bits == 6 else 8):
        step = 2 if bits == 4 else 4
        raise ValueError(
            f"{op}: w is {list(given.shape)}, need n a multiple of {step} for {format}. Pad it with zeros."
        )
    size = k if group_size is None else checks.whole(op, "group_size", group_size, 1)
    if size and k % size:
        raise ValueError(f"{op}: group_size is {size} and k is {k}, need a divisor of k.")
    wide = lax.stop_gradient(given).astype(jnp.float32).reshape(*lead, k // max(size, 1), size, n)
    scales = jnp.max(jnp.abs(wide), axis=-2, initial=0.0) / (
        packing.LARGEST_FP6 if bits == 6 else 2.0 ** (bits - 1)
    )
    scaled = wide / jnp.where(scales == 0, 1.0, scales)[..., None, :]
    return QuantizedWeight(_stored(scaled.reshape(*lead, k, n), bits), scales, format)


def _stored(scaled: jax.Array, bits: int) -> jax.Array:
    if bits == 6:
        largest = packing.LARGEST_FP6
        return packing.pack_fp6(packing.encode_fp6(jnp.clip(scaled, -largest, largest)))
    whole = jnp.clip(jnp.round(scaled), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return whole.astype(jnp.int8) if bits == 8 else packing.pack_int4(whole)


def dequantize(w: QuantizedWeight, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The numbers that a `QuantizedWeight` stands for.

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.full((2, 4), 7.0), "fp6_e3m2"), jnp.bfloat16)[0].tolist()
    [7.0, 7.0, 7.0, 7.0]

    Args:
      w: a `QuantizedWeight` [.., k, n].
      dtype: bfloat16, float16 or float32.

    Returns:
      [.., k, n] in dtype: value * scale in float32, rounded once.

    Raises:
      TypeError, ValueError: values and scales that do not fit each other.
    """
    values, scales, kind = checked("dequantize", "w", w)
    if kind == "int8":
        numbers = values.astype(jnp.float32)
    elif kind == "int4":
        numbers = packing.unpack_int4(values).astype(jnp.float32)
    else:
        numbers = packing.decode_fp6(packing.unpack_fp6(values))
    *lead, k, n = numbers.shape
    groups = scales.shape[-2]
    grouped = numbers.reshape(*lead, groups, k // max(groups, 1), n) * scales[..., None, :]
    return grouped.reshape(numbers.shape).astype(dtype)


def checked(op: str, name: str, w: Any) -> tuple[jax.Array, jax.Array, str]:
    """Values, scales and format of a `QuantizedWeight`."""
    if not isinstance(w, QuantizedWeight):
        raise TypeError(
            f"{op}: {name} is {checks.described(w)}, need a QuantizedWeight: "
            f"jax_deepgemm.inference.quantize({name})."
        )
    values, scales = unwrapped(w.values), unwrapped(w.scales)
    stored = np.dtype(_STORED[checks.choice(op, f"the format of {name}", w.format, tuple(FORMATS))])
    right = np.dtype(values.dtype) == stored and np.dtype(scales.dtype) == np.float32
    if not right or values.ndim < 2 or values.ndim != scales.ndim:
        raise TypeError(
            f"{op}: {name} has values {checks.described(values)} and scales {checks.described(scales)}, "
            f"need {stored.name} [.., k, stored n] and float32 [.., groups, n] for {w.format}."
        )
    whole = not values.shape[-1] * 8 % w.bits
    k, groups = values.shape[-2], scales.shape[-2]
    fits = scales.shape == (*w.shape[:-2], groups, w.shape[-1])
    if not (whole and fits and (k % groups == 0 if groups else k == 0)):
        raise ValueError(
            f"{op}: {name} has {w.format} values {list(values.shape)} and scales {list(scales.shape)}, need "
            f"[.., k, n * {w.bits} / 8] and [.., groups, n], where groups divides k."
        )
    return jnp.asarray(values), jnp.asarray(scales), w.format


def per_channel(op: str, name: str, w: QuantizedWeight) -> PerChannelArray | None:
    """What the products of a scale a channel take, without a copy; None of any other weight."""
    values, scales, kind = checked(op, name, w)
    if kind != "int8" or scales.shape[-2] != 1:
        return None
    return PerChannelArray(values, scales[..., 0, :])
