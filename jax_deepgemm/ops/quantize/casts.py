"""DeepGEMM's cast helpers: (values, scales) tuples, float8_e4m3fn, made by `quantize`.

With its bits: an amax counts as at least 1e-4, so numbers far below that lose digits and vanish. `quantize`
has no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.array import Block
from jax_deepgemm.ops.quantize.scale_layout import WORD, pack_ue8m0_to_int

Pair = tuple[jax.Array, jax.Array]
MIN_AMAX = 1e-4


def per_token_cast_to_fp8(
    x: ArrayLike, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Pair:
    """FP8 values of x with one scale per row and gran_k columns, as for activations.

    scale = max(amax, 1e-4) / 448 of each block, with `use_ue8m0` rounded up to a power of two; x = value *
    scale, rounded.

    Args:
      x: [.., m, k] bfloat16, float16 or float32.
      use_ue8m0: scales are powers of two.
      gran_k: columns per scale; the last block may be ragged.
      use_packed_ue8m0: scales as int32 words of four UE8M0 codes; ceil(k / gran_k) must be a multiple of 4.

    Returns:
      (values, scales): values float8_e4m3fn [.., m, k], scales [.., m, ceil(k / gran_k)] float32 (packed:
      [.., m, ceil(k / gran_k) / 4] int32).

    Raises:
      TypeError: x is of another type.
      ValueError: fewer than two dimensions, a block of no columns, scales that do not fill whole words,
        use_packed_ue8m0 without use_ue8m0.

    Source: DeepGEMM's function of this name.

    >>> values, scales = per_token_cast_to_fp8(jnp.ones((4, 256)))
    >>> values.dtype.name, scales.shape
    ('float8_e4m3fn', (4, 2))
    """
    if use_packed_ue8m0 and not use_ue8m0:
        raise ValueError(
            "per_token_cast_to_fp8: use_packed_ue8m0 packs exponents, so it needs use_ue8m0=True."
        )
    values, scales = _cast(x, (1, gran_k), use_ue8m0)
    if use_packed_ue8m0:
        if scales.shape[-1] % WORD:
            raise ValueError(
                f"per_token_cast_to_fp8: {scales.shape[-1]} scales per row do not fill words of {WORD}. Use "
                "use_packed_ue8m0=False and get_mn_major_tma_aligned_packed_ue8m0_tensor, which pads."
            )
        scales = pack_ue8m0_to_int(scales)
    return values, scales


def per_channel_cast_to_fp8(x: ArrayLike, use_ue8m0: bool = False, gran_k: int = 128) -> Pair:
    """FP8 values of x with one scale per column and gran_k rows, as for weight gradients.

    Args:
      x: [.., m, k] bfloat16, float16 or float32.
      use_ue8m0: scales are powers of two.
      gran_k: rows per scale; the last block may be ragged.

    Returns:
      (values, scales): values float8_e4m3fn [.., m, k], scales [.., ceil(m / gran_k), k] float32, as
      `per_token_cast_to_fp8` makes them.

    Raises:
      TypeError: x is of another type.
      ValueError: fewer than two dimensions, a block of no rows.

    Source: DeepGEMM's function of this name.

    >>> per_channel_cast_to_fp8(jnp.ones((256, 5)))[1].shape
    (2, 5)
    """
    return _cast(x, (gran_k, 1), use_ue8m0)


def per_block_cast_to_fp8(x: ArrayLike, use_ue8m0: bool = False, gran_k: int = 128) -> Pair:
    """FP8 values of x with one scale per gran_k rows and columns, as for weights.

    Args:
      x: [.., m, k] bfloat16, float16 or float32.
      use_ue8m0: scales are powers of two.
      gran_k: rows, and columns, per scale; the last blocks may be ragged.

    Returns:
      (values, scales): values float8_e4m3fn [.., m, k], scales [.., ceil(m / gran_k), ceil(k / gran_k)]
      float32, as `per_token_cast_to_fp8` makes them.

    Raises:
      TypeError: x is of another type.
      ValueError: fewer than two dimensions, an empty block.

    Source: DeepGEMM's function of this name.

    >>> per_block_cast_to_fp8(jnp.ones((576, 7168)))[1].shape
    (5, 56)
    """
    return _cast(x, (gran_k, gran_k), use_ue8m0)


def per_custom_dims_cast_to_fp8(x: ArrayLike, dims: Sequence[int], use_ue8m0: bool = False) -> Pair:
    """FP8 values of x with one scale per index over `dims`, shared by all other dimensions.

    Args:
      x: [d0, d1, ..] bfloat16, float16 or float32.
      dims: the dimensions that have scales of their own, at least one; negative ones count from the end.
      use_ue8m0: scales are powers of two.

    Returns:
      (values, scales): values float8_e4m3fn of x's shape, scales float32 with the dimensions `dims` of x in
      ascending order, without those of size one.

    Raises:
      TypeError: x is of another type.
      ValueError: `dims` that x has not, or the same one twice.

    Source: DeepGEMM's function of this name.

    >>> values, scales = per_custom_dims_cast_to_fp8(jnp.ones((6, 1, 64)), dims=(0,))
    >>> values.shape, scales.shape
    ((6, 1, 64), (6,))
    """
    x = jnp.asarray(x)
    kept = sorted({dim + x.ndim if dim < 0 else dim for dim in dims})
    if len(kept) != len(dims) or not kept or not 0 <= kept[0] <= kept[-1] < x.ndim:
        raise ValueError(
            f"per_custom_dims_cast_to_fp8: dims {tuple(dims)} of an array of rank {x.ndim}; need different "
            "dimensions of it, at least one."
        )
    order = kept + [dim for dim in range(x.ndim) if dim not in kept]
    lead = [x.shape[dim] for dim in kept]
    moved = jnp.transpose(x, order)
    cols = math.prod(moved.shape[len(kept) :])
    values, scales = _cast(moved.reshape(math.prod(lead), cols), (1, max(cols, 1)), use_ue8m0)
    back = [order.index(dim) for dim in range(x.ndim)]
    squeezed = [extent for extent in lead if extent != 1]
    scales = scales.reshape(squeezed) if cols else jnp.zeros(squeezed, jnp.float32)
    return jnp.transpose(values.reshape(moved.shape), back), scales


def _cast(x: Any, block: Block, use_ue8m0: bool) -> Pair:
    q = quantize(x, block, scale_format="ue8m0" if use_ue8m0 else "f32", min_amax=MIN_AMAX)
    return q.values, q.scales
