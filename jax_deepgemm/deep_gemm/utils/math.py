"""Numbers: rounding up, and casts to FP8 and FP4 with DeepGEMM's bits."""

from __future__ import annotations

from jax_deepgemm.deep_gemm.utils.fp4 import cast_back_from_fp4, per_token_cast_to_fp4, transpose_packed_fp4
from jax_deepgemm.ops.quantize import (
    ceil_to_ue8m0,
    pack_ue8m0_to_int,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp8,
    unpack_ue8m0_from_int,
)

__all__ = [
    "align",
    "cast_back_from_fp4",
    "ceil_div",
    "ceil_to_ue8m0",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp4",
    "per_token_cast_to_fp8",
    "transpose_packed_fp4",
    "unpack_ue8m0_from_int",
]


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up.

    Args:
      x: a whole number.
      y: a positive one.

    Returns:
      int. Raises nothing but ZeroDivisionError.

    >>> ceil_div(7, 4), ceil_div(8, 4)
    (2, 2)
    """
    return -(-x // y)


def align(x: int, y: int) -> int:
    """x, rounded up to a multiple of y.

    Args:
      x: a whole number.
      y: a positive one.

    Returns:
      int. Raises nothing but ZeroDivisionError.

    >>> align(7, 4), align(8, 4)
    (8, 8)
    """
    return ceil_div(x, y) * y
