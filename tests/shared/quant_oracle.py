"""Block quantisation in NumPy and ml_dtypes, one block at a time: shares nothing with the package."""

from __future__ import annotations

import ml_dtypes
import numpy as np

TOP = {"float8_e4m3fn": np.float32(448), "float8_e5m2": np.float32(57344)}


def quantize(x, block, dtype="float8_e4m3fn", scale_format="f32", min_amax=0.0):
    """(values, scales) of a NumPy array of rank >= 2."""
    f8 = np.dtype(getattr(ml_dtypes, dtype))
    if x.ndim > 2:
        parts = [quantize(part, block, dtype, scale_format, min_amax) for part in x]
        if parts:
            return np.stack([v for v, _ in parts]), np.stack([s for _, s in parts])
        grid = tuple(-(-n // b) for n, b in zip(x.shape[-2:], block, strict=True))
        return np.empty(x.shape, f8), np.empty(x.shape[:-2] + grid, np.float32)
    (r, c), (rows, cols) = block, x.shape
    values = np.empty(x.shape, f8)
    scales = np.empty((-(-rows // r), -(-cols // c)), np.float32)
    for i, j in np.ndindex(scales.shape):
        here = np.s_[i * r : (i + 1) * r, j * c : (j + 1) * c]
        values[here], scales[i, j] = quantize_block(x[here].astype(np.float32), f8, scale_format, min_amax)
    return values, scales


def quantize_block(x, f8, scale_format, min_amax):
    top, smallest = TOP[f8.name], np.finfo(np.float32).smallest_normal
    x = np.where(np.abs(x) < smallest, np.copysign(np.float32(0), x), x)
    finite = np.isfinite(x)
    amax = np.float32(max(np.abs(x[finite]).max(initial=0), np.float32(min_amax), top * smallest))
    scale = amax / top
    if scale_format == "ue8m0":
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    inverse = np.float32(1) / scale
    with np.errstate(all="ignore"):
        y = np.clip(x * inverse, -top, top).astype(f8)
        special = np.full_like(x, np.nan) if f8.name == "float8_e4m3fn" else x
        return np.where(finite, y, special.astype(f8)), scale


def dequantize(values, scales, block, dtype=np.float32):
    wide = np.repeat(np.repeat(scales, block[0], -2), block[1], -1)[
        ..., : values.shape[-2], : values.shape[-1]
    ]
    return (values.astype(np.float32) * wide).astype(dtype)
