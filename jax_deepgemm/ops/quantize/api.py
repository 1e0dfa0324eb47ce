"""quantize and dequantize."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize import fp4
from jax_deepgemm.ops.quantize.array import FP8_MAX, Block, QuantizedArray, as_dtype, check_block
from jax_deepgemm.ops.quantize.op import dequantize_op, quantize_op

SCALE_FORMATS = ("f32", "ue8m0")
FLOATS = tuple(np.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32))


def quantize(
    x: ArrayLike,
    block: Block = (1, 128),
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
    *,
    min_amax: float = 0.0,
) -> QuantizedArray:
    """FP8 values of x with one scale per block; or FP4 values.

    For each block: amax = max |x| in float32; scale = amax / 448 (57344 for float8_e5m2), with "ue8m0"
    rounded up to a power of two; value = x * (1 / scale), saturated, rounded to nearest even. Each operation
    is correctly rounded, so eager, jit, every device and every sharding give the same bits.

    Scales follow the data: the relative error is the same at any magnitude, down to an amax of 5.3e-36
    (6.8e-34 for float8_e5m2), where a scale is the smallest normal float32, 2**-126. It does not get smaller,
    so blocks of zeros have that scale. Subnormal numbers count as zeros.

    NaN and infinities do not count in amax and touch no other element: NaN stays NaN, infinities stay what
    they are in float8_e5m2 and become NaN in float8_e4m3fn, which has none.

    Args:
      x: [.., rows, cols] bfloat16, float16 or float32; any rank >= 2, any dimension may be 0.
      block: rows and cols that share a scale: (1, 128) for activations, (128, 128) for weights, (128, 1) for
        the operands of weight gradients, (1, 32) as in MX formats; or any other pair. The last blocks may be
        ragged.
      dtype: float8_e4m3fn or float8_e5m2; or float4_e2m1fn, with block (1, 32) for MXFP4, whose scale is amax
        / 6 rounded up to a power of two, in either format; or with (1, 16) for NVFP4, of a matrix or several
        [.., rows, cols]. Its global scale is amax of the matrix / (6 * 448), and a block's scale amax / 6 /
        global scale, rounded to float8_e4m3fn (at least 2**-9; 1 of zeros): the formula of NVIDIA's ModelOpt.
      scale_format: "f32", or "ue8m0" for powers of two. Both are held in float32.
      min_amax: what the amax of a block counts as at least. 1e-4 gives the bits of DeepGEMM's casts, in which
        blocks of numbers far below that lose digits and become zeros.

    Returns:
      QuantizedArray with values of x's shape and scales [.., ceil(rows / block[0]), ceil(cols / block[1])].
      With float4_e2m1fn an `Fp4Array` (see `quantize_fp4`), float32 global scales [..] in it with NVFP4.

    Raises:
      TypeError, ValueError: types, ranks, blocks or formats outside the above.

    Has no derivative: differentiate through fp8_linear, which quantises in its own forward and backward pass.

    >>> x = jnp.arange(512, dtype=jnp.float32).reshape(2, 256)
    >>> q = quantize(x)
    >>> q.scales.shape
    (2, 2)
    >>> bool(q.scales[0, 0] == np.float32(127) / np.float32(448))
    True
    >>> quantize(x, (128, 128), jnp.float8_e5m2, "ue8m0").scales.tolist()
    [[0.0078125, 0.015625]]
    >>> quantize(x, (1, 32), jnp.float4_e2m1fn).scales.shape
    (2, 8)
    """
    if as_dtype("quantize", "dtype", dtype, _names(FP8_MAX)) == fp4.E2M1:
        return _fp4(x, block, scale_format, min_amax)
    x, block, dtype = checked_input(x, block, dtype, scale_format)
    op = quantize_op(block, dtype, scale_format, _checked_amax(min_amax))
    values, scales = over_leading(op, x.ndim - 2)(x)
    return QuantizedArray(values, scales, block)


def _fp4(x: Any, block: Any, scale_format: str, min_amax: Any) -> Any:
    """An Fp4Array; typed as what the other dtypes give."""
    block = check_block(block, "quantize")
    if block not in ((1, fp4.BLOCK), (1, fp4.NVFP4_BLOCK)):
        raise ValueError(
            f"quantize: block is {block} and dtype is float4_e2m1fn, need (1, 32), as MXFP4 has it, or (1, "
            f"16), "
            "as NVFP4: quantize(x, (1, 32), jnp.float4_e2m1fn)."
        )
    _check_format("quantize", scale_format)
    if block == (1, fp4.BLOCK):
        return fp4.encode("quantize", x, _checked_amax(min_amax))
    if scale_format != "f32":
        raise ValueError(
            f"quantize: scale_format is {scale_format!r} and block is (1, 16): scales of NVFP4 are "
            "float8_e4m3fn. Leave scale_format out, or take MXFP4: block (1, 32)."
        )
    return fp4.encode_nvfp4("quantize", x, _checked_amax(min_amax))


def dequantize(q: QuantizedArray, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """values * scales: one float32 product per element, then one rounding to dtype.

    Args:
      q: QuantizedArray.
      dtype: float32, bfloat16 or float16.

    Returns:
      Array of q's shape.

    Raises:
      TypeError, ValueError: if q is no QuantizedArray, or its parts do not fit each other, or the dtype is
      another.

    Has no derivative: differentiate through fp8_linear.

    >>> x = jnp.linspace(-1, 1, 256).reshape(2, 128)
    >>> bool(jnp.max(jnp.abs(dequantize(quantize(x)) - x)) < 2**-4)
    True
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"dequantize: got a {type(q).__name__}, need a QuantizedArray. From a (values, scales) tuple: "
            "from_tuple((values, scales), block=...)."
        )
    q.check("dequantize", "q")
    dtype = _checked_dtype("dequantize", dtype, FLOATS)
    op = functools.partial(dequantize_op(q.block), block=q.block, dtype=dtype)
    return over_leading(op, q.ndim - 2)(q.values, q.scales)[0]


def over_leading(op: Callable[..., list[jax.Array]], count: int) -> Callable[..., list[jax.Array]]:
    """The op over leading dimensions, as levels of vmap: cut ones stay cut."""
    for _ in range(count):
        op = jax.vmap(op)
    return op


def checked_input(
    x: Any, block: Any, dtype: Any, scale_format: str, where: str = "quantize"
) -> tuple[jax.Array, Block, np.dtype]:
    """x as an array, the block and the dtype, checked; `where` is the function that errors name."""
    x = unwrapped(x)
    if isinstance(x, QuantizedArray):
        raise TypeError(
            f"{where}: x is a QuantizedArray already. For another block or type: quantize(dequantize(x), "
            "...)."
        )
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}, need a JAX or NumPy array. Make one: jnp.asarray(x)."
        )
    if x.dtype not in FLOATS:  # before JAX makes an array of its own of it, with fewer bits
        raise TypeError(
            f"{where}: x is {x.dtype.name}, need {_names(FLOATS)}. Convert it: x.astype(jnp.float32)."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{where}: x has shape {list(x.shape)}, need rank >= 2. For a vector: quantize(x[None], ...)."
        )
    dtype = _checked_dtype(where, dtype, FP8_MAX)
    _check_format(where, scale_format)
    return jnp.asarray(x), check_block(block, where), dtype


def _check_format(where: str, scale_format: str) -> None:
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"{where}: scale_format is {scale_format!r}, need 'f32' (any float32) or 'ue8m0' (powers of two)."
        )


def _checked_amax(min_amax: Any) -> float:
    if isinstance(min_amax, bool) or not isinstance(min_amax, (int, float)) or not 0 <= min_amax < 2.0**126:
        raise ValueError(
            f"quantize: min_amax is {min_amax!r}, need a Python number from 0 on: 0 for scales that follow "
            "the data, 1e-4 for DeepGEMM's."
        )
    return float(min_amax)


def _checked_dtype(where: str, value: Any, allowed: Collection[np.dtype]) -> np.dtype:
    dtype = as_dtype(where, "dtype", value, _names(allowed))
    if dtype not in allowed:
        raise TypeError(f"{where}: dtype is {dtype.name}, need {_names(allowed)}.")
    return dtype


def _names(dtypes: Collection[np.dtype]) -> str:
    return " or ".join(dtype.name for dtype in dtypes)
