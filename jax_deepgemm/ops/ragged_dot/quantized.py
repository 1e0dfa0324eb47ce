"""Ragged products of quantised operands: which grouped product each of them is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.gemm.checks import Options, describe, is_qwix
from jax_deepgemm.ops.grouped import api
from jax_deepgemm.ops.grouped.checks import Rows
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, quantize
from jax_deepgemm.ops.quantize.array import QuantizedArray
from jax_deepgemm.ops.quantize.fp4 import nvfp4_parts
from jax_deepgemm.ops.quantize.per_channel import products


def is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray | PreparedFp4 | Fp4Array) or (isinstance(x, tuple) and len(x) == 2)


def as_array(name: str, what: str, x: Any) -> jax.Array:
    x = unwrapped(x)
    if isinstance(x, (jax.Array, np.ndarray)):
        return jnp.asarray(x)
    if is_quantized(x):
        raise TypeError(
            f"{name}: {what} is quantised, need an array. ragged_dot takes quantised operands, if both are."
        )
    convert = (
        f" jax_deepgemm.quantization.from_qwix({what}) makes a QuantizedArray of it." if is_qwix(x) else ""
    )
    raise TypeError(f"{name}: {what} is a {type(x).__name__}, need a jax or numpy array.{convert}")


def sizes_of_rows(sizes: jax.Array, rows: Sequence[int]) -> jax.Array:
    """int32 group sizes, in rows that each stand for all of `rows` behind the first, the ragged one."""
    if sizes.dtype.itemsize < 4:
        sizes = sizes.astype(jnp.int32)
    return jnp.clip(sizes, 0, rows[0]).astype(jnp.int32) * math.prod(rows[1:])


def quantized_dot(
    lhs: Any, rhs: Any, group_sizes: Any, rhs_layout: str, allow_transpose: bool, **options: Any
) -> jax.Array:
    fp4 = isinstance(rhs, PreparedFp4 | Fp4Array)
    if isinstance(rhs, PreparedFp4) and rhs.is_nvfp4 and not is_quantized(lhs):
        return _nvfp4_dot(as_array("ragged_dot", "lhs", lhs), rhs, group_sizes, rhs_layout, options)
    if isinstance(rhs, Fp4Array) and nvfp4_parts(rhs) is not None:
        raise TypeError("ragged_dot: rhs is NVFP4 and not prepared. Prepare it once: prepare_fp4(rhs).")
    if fp4 and not is_quantized(lhs):
        lhs = quantize(lhs)
    for what, x, other in (("lhs", lhs, "rhs"), ("rhs", rhs, "lhs")):
        if not is_quantized(x):
            block = (1, 128) if what == "lhs" else (128, 128)
            raise TypeError(
                f"ragged_dot: {other} is quantised and {what} is not, need both or neither. Quantise it: "
                f"jax_deepgemm.quantize({what}, {block})."
            )
    values = lhs.values if isinstance(lhs, QuantizedArray) else lhs[0]
    sizes = _checked_sizes(group_sizes, values.shape[:1] or (0,))
    if fp4:
        _check_layout(rhs, rhs_layout)
    if rhs_layout == "gnk":
        return api.m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, sizes, **options)
    if allow_transpose:
        return api.m_grouped_fp8_gemm_nn_contiguous(lhs, rhs, sizes, **options)
    raise ValueError(
        "ragged_dot: the quantised rhs is stored [g, k, n], and FP8 tensor cores read along k. Store it "
        "[g, n, k], as quantize(rhs.mT, (128, 128)), and say rhs_layout='gnk'; or accept that its bytes are "
        "transposed at each call: allow_transpose=True."
    )


def _checked_sizes(group_sizes: Any, rows: Sequence[int]) -> jax.Array:
    sizes = as_array("ragged_dot", "group_sizes", group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"ragged_dot: group_sizes are {sizes.dtype.name}, need integers.")
    return sizes_of_rows(sizes, rows)


def _check_layout(rhs: PreparedFp4 | Fp4Array, rhs_layout: str) -> None:
    if rhs_layout != "gnk":
        raise ValueError(
            f"ragged_dot: rhs is FP4 {list(rhs.shape)} and rhs_layout is 'gkn'. FP4 weights are stored "
            "[g, n, k]: say rhs_layout='gnk'."
        )


def _nvfp4_dot(
    lhs: jax.Array, rhs: PreparedFp4, group_sizes: Any, rhs_layout: str, options: dict[str, Any]
) -> jax.Array:
    """Rows stay in bfloat16."""
    if lhs.dtype != jnp.bfloat16:
        raise TypeError(
            f"ragged_dot: lhs is {describe(lhs)} and rhs is NVFP4, need bfloat16: lhs.astype(jnp.bfloat16)."
        )
    _check_layout(rhs, rhs_layout)
    sizes = _checked_sizes(group_sizes, lhs.shape[:1] or (0,))
    return api.m_grouped_bf16_gemm_nt_contiguous(lhs, rhs, sizes, **options)


def per_channel_dot(
    lhs: Any, rhs: Any, sizes: Any, rhs_layout: str, offset: Any, expected_m: Any, options: Options
) -> jax.Array:
    if rhs_layout != "gkn":
        raise ValueError(
            "ragged_dot: rhs has a scale a channel and rhs_layout is 'gnk', need it stored [g, k, n]: "
            "quantize_per_channel(w.mT)."
        )
    lhs, sizes = as_array("ragged_dot", "lhs", lhs), as_array("ragged_dot", "group_sizes", sizes)
    rows = Rows(sizes_of_rows(sizes, lhs.shape[:1] or (0,)), None, None, None, offset)
    return products().contiguous("ragged_dot", "lhs", lhs, "rhs", rhs, rows, expected_m, options)
