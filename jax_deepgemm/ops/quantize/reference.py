"""Block quantisation in jax.numpy: the exact arithmetic, on every platform.

    amax  = max |x| over the finite elements of the block, at least top * 2**-126, top the largest FP8 value
    scale = amax / top, rounded to nearest even; "ue8m0": then up to a power of two
    value = round_to_nearest_even(x * (1 / scale))

So a scale is at least 2**-126, the smallest normal float32: its inverse is finite, and a block of zeros stays
zeros. Subnormal x count as zeros of their sign, as some devices flush them and others do not.

Both quotients are correctly rounded by integer arithmetic on their bits. Compilers may turn a / (b / c) into
a * c / b, a division by a constant into a product, and GPU divisions may be 2 ulp off; none of that can
happen here, so that eager, jit, every device and every sharding give the same bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.quantize.array import FP8_MAX, Block

SMALLEST_NORMAL = 2.0**-126
"""The smallest normal float32: a smaller number counts as zero, a smaller scale as this."""


def smallest_amax(dtype: np.dtype) -> float:
    """What the amax of a block counts as at least: its scale is then the smallest normal number."""
    return FP8_MAX[np.dtype(dtype)] * SMALLEST_NORMAL


def quantize(
    x: jax.Array, *, block: Block, dtype: np.dtype, scale_format: str, min_amax: float = 0.0
) -> list[jax.Array]:
    """[values, scales] of x [.., rows, cols]."""
    return quantize_float32(
        exact_float32(x), block=block, dtype=dtype, scale_format=scale_format, min_amax=min_amax
    )


def quantize_float32(
    x: jax.Array, *, block: Block, dtype: np.dtype, scale_format: str, min_amax: float = 0.0
) -> list[jax.Array]:
    """[values, scales] of x in float32."""
    scales = scales_from_amax(block_amax(x, block), dtype, scale_format, min_amax)
    return [cast_scaled(x, expand(reciprocal(scales), x.shape, block), dtype), scales]


def quantize_both(
    x: jax.Array, *, dtype: np.dtype, scale_format: str, block_t: Block = (128, 1)
) -> list[jax.Array]:
    """[values, scales, values_t, scales_t] of x in float32, [.., m, k]; see fused.py."""
    values, scales = quantize_float32(x, block=(1, 128), dtype=dtype, scale_format=scale_format)
    along_rows, scales_t = quantize_float32(x, block=block_t, dtype=dtype, scale_format=scale_format)
    return [values, scales, along_rows.mT, scales_t]


def zero_rows(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    """x [.., m, k] with zeros from row rows [.., 1] on."""
    if rows is None:
        return x
    index = lax.broadcasted_iota(jnp.int32, (x.shape[-2], 1), 0)
    return jnp.where(index < rows[..., None], x, jnp.zeros((), x.dtype))


def dequantize(values: jax.Array, scales: jax.Array, *, block: Block, dtype: np.dtype) -> list[jax.Array]:
    """[values * scales], one float32 product per element, rounded once to dtype."""
    return [(values.astype(jnp.float32) * expand(scales, values.shape, block)).astype(dtype)]


def exact_float32(x: jax.Array) -> jax.Array:
    """x in float32; bfloat16 keeps its rounding even if XLA elides a float32 -> bfloat16 -> float32 pair."""
    wide = x.astype(jnp.float32)
    return lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7) if x.dtype == jnp.bfloat16 else wide


def finite_magnitude(x: jax.Array) -> jax.Array:
    """|x|, and 0 for NaN and infinities: they do not count in a block's amax."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.float32(0))


def block_amax(x: jax.Array, block: Block) -> jax.Array:
    """Largest finite |x| of each block of x [.., rows, cols]; the last blocks may be ragged."""
    (r, c), (*lead, rows, cols) = block, x.shape
    magnitude = jnp.pad(finite_magnitude(x), [(0, 0)] * len(lead) + [(0, -rows % r), (0, -cols % c)])
    tiles = magnitude.reshape(*lead, -(-rows // r), r, -(-cols // c), c)
    return jnp.max(tiles, axis=(-3, -1), initial=0.0)


def expand(grid: jax.Array, shape: tuple[int, ...], block: Block) -> jax.Array:
    """The grid's entry of each element of an array of this shape, [.., rows, cols]."""
    (r, c), (*lead, nr, nc) = block, grid.shape
    wide = jnp.broadcast_to(grid[..., :, None, :, None], (*lead, nr, r, nc, c)).reshape(*lead, nr * r, nc * c)
    return wide[..., : shape[-2], : shape[-1]]


def scales_from_amax(amax: jax.Array, dtype: np.dtype, scale_format: str, min_amax: float = 0.0) -> jax.Array:
    """Scales of blocks with this amax, which counts as at least min_amax."""
    scales = divide_by_fp8_max(jnp.maximum(amax, jnp.float32(max(min_amax, smallest_amax(dtype)))), dtype)
    return ceil_to_power_of_two(scales) if scale_format == "ue8m0" else scales


def cast_scaled(x: jax.Array, inverse: jax.Array, dtype: np.dtype) -> jax.Array:
    """x * inverse in FP8: finite elements saturate, infinities stay (e5m2) or become NaN (e4m3fn)."""
    top = jnp.float32(FP8_MAX[np.dtype(dtype)])
    infinite = x if np.dtype(dtype) == np.dtype(jnp.float8_e5m2) else jnp.full_like(x, jnp.nan)
    special = jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), infinite)
    scaled = jnp.clip(_without_subnormals(x) * inverse, -top, top)
    rounded = jnp.where(jnp.isfinite(x), scaled, special).astype(dtype)
    # XLA for GPUs allows excess precision: it would drop the rounding where a dequantisation follows in the
    # same program.
    return lax.optimization_barrier(rounded)


def _without_subnormals(x: jax.Array) -> jax.Array:
    """x, and a zero of its sign where it is subnormal."""
    return jnp.where(jnp.abs(x) < jnp.float32(SMALLEST_NORMAL), jnp.copysign(jnp.float32(0), x), x)


def divide_by_fp8_max(amax: jax.Array, dtype: np.dtype) -> jax.Array:
    """amax / 448 or amax / 57344, correctly rounded. amax is a normal number: both divisors are 7 * 2**n."""
    shift = {448.0: 6, 57344.0: 13}[FP8_MAX[np.dtype(dtype)]]
    exponent, mantissa = _split(amax)
    up = jnp.where(mantissa * 4 < 7 << 23, jnp.uint32(3), jnp.uint32(2))  # so that the quotient has 24 bits
    dividend = mantissa << up
    quotient = dividend // jnp.uint32(7)
    quotient += (dividend - quotient * 7 > 3).astype(jnp.uint32)
    return _join(exponent - up.astype(jnp.int32) - shift, quotient)


def reciprocal(scales: jax.Array) -> jax.Array:
    """1 / scales, correctly rounded, of normal numbers below 2**126."""
    exponent, mantissa = _split(scales)
    guess = jnp.float32(2.0**47) / mantissa.astype(jnp.float32)  # within a few units, whatever the division
    quotient = guess.astype(jnp.uint32)
    rest = lax.bitcast_convert_type(
        jnp.uint32(0) - quotient * mantissa, jnp.int32
    )  # 2**47 - quotient * mantissa
    signed = mantissa.astype(jnp.int32)
    step = jnp.floor_divide(rest, signed)
    quotient = lax.bitcast_convert_type(quotient, jnp.int32) + step
    quotient += (2 * (rest - step * signed) > signed).astype(jnp.int32)
    return _join(jnp.int32(254 - 1) - exponent, lax.bitcast_convert_type(quotient, jnp.uint32))


def ceil_to_power_of_two(scales: jax.Array) -> jax.Array:
    """The smallest power of two >= |scales|, its biased exponent held to [1, 254] (UE8M0)."""
    bits = lax.bitcast_convert_type(scales.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    exponent = (bits >> 23) + ((bits & jnp.uint32(0x7FFFFF)) != 0).astype(jnp.uint32)
    return lax.bitcast_convert_type(jnp.clip(exponent, 1, 254).astype(jnp.uint32) << 23, jnp.float32)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Biased exponent (int32) and 24-bit mantissa (uint32) of positive normal numbers."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    mantissa = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    return (bits >> 23).astype(jnp.int32), mantissa


def _join(exponent: jax.Array, mantissa: jax.Array) -> jax.Array:
    """The float32 with this biased exponent and 24-bit mantissa; 2**24 carries into the exponent."""
    bits = (exponent.astype(jnp.uint32) << 23) + (mantissa - jnp.uint32(0x800000))
    return lax.bitcast_convert_type(bits, jnp.float32)
