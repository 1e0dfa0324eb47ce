"""Products whose scales are for 32 of k: operands, and what they must give, in NumPy.

`fused` adds as the kernels do, one block of 32 after the other, each of them multiplied by (scale of the row
* scale of the column) and added in one rounding. Where the products of a block are exact, because values are
small integers, a kernel's float32 result has its bits.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.quantization import QuantizedArray

SQUARE, ROW = (32, 32), (1, 32)
F32 = np.float32


def operand(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    block: tuple[int, int],
    power: bool = False,
    dtype: Any = None,
) -> QuantizedArray:
    """Small integers, whose products of 32 are exact, with scales of any bits, or powers of two."""
    *lead, rows, cols = shape
    values = rng.integers(-4, 5, shape).astype(dtype or jnp.float8_e4m3fn)
    scales = np.exp2(rng.uniform(-3, 3, (*lead, ceil_div(rows, block[0]), ceil_div(cols, block[1]))))
    scales = np.exp2(np.round(np.log2(scales))) if power else scales
    return QuantizedArray(jnp.asarray(values), jnp.asarray(scales, jnp.float32), block)


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], block: tuple[int, int], dtype: Any = None
) -> QuantizedArray:
    """Standard normal numbers, rounded, with scales of any bits."""
    q = operand(rng, shape, block)
    return QuantizedArray(
        jnp.asarray(rng.standard_normal(shape), dtype or jnp.float8_e4m3fn), q.scales, block
    )


def scale_rows(q: QuantizedArray) -> np.ndarray[Any, Any]:
    """float32 [rows, blocks of k], a row for each of the operand's."""
    scales = np.asarray(q.scales)
    return scales if q.block[0] == 1 else np.repeat(scales, q.block[0], axis=-2)[..., : q.shape[-2], :]


def exact(a: QuantizedArray, b: QuantizedArray) -> np.ndarray[Any, Any]:
    """A @ B.T in float64."""
    wide = []
    for q in (a, b):
        scales = np.repeat(scale_rows(q).astype(np.float64), 32, axis=-1)[..., : q.shape[-1]]
        wide.append(np.asarray(q.values).astype(np.float64) * scales)
    return wide[0] @ np.swapaxes(wide[1], -1, -2)


def fused(a: QuantizedArray, b: QuantizedArray, splits: int = 1) -> np.ndarray[Any, Any]:
    """float32 A @ B.T in the kernels' order; `splits` ranks have parts of k, in quads of 128.

    A float64 holds each sum of two without rounding: products of integers below 2**10 and scales within six
    binades of each other.
    """
    rows, cols = scale_rows(a), scale_rows(b)
    left, right = (np.asarray(q.values).astype(np.float64) for q in (a, b))
    quads = ceil_div(ceil_div(left.shape[1], 128), 4)
    total = np.zeros((left.shape[0], right.shape[0]), F32)
    for rank in range(splits):
        part = np.zeros_like(total)
        begin, end = (min(r * quads // splits * 16, rows.shape[1]) for r in (rank, rank + 1))
        for block in range(begin, end):
            k = slice(32 * block, 32 * block + 32)
            factor = np.outer(rows[:, block], cols[:, block])  # float32: rounded once
            assert factor.dtype == F32
            part = (factor.astype(np.float64) * (left[:, k] @ right[:, k].T) + part).astype(F32)
        total = total + part
    return total
