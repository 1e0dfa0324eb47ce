"""FP4 weights as DeepGEMM's users have them, as the products of FP8 take them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.gemm.checks import describe
from jax_deepgemm.ops.quantize import PreparedFp4, pack_ue8m0_to_int, prepare_fp4
from jax_deepgemm.ops.quantize.fp4 import BLOCK, WORD


def prepared(op: str, name: str, values: Any, scales: Any, gran_k: int | None) -> PreparedFp4:
    """The weight in the order in which kernels read it.

    Args:
      op, name: for errors.
      values: int8 or uint8 [.., n, k / 2].
      scales: [.., n, ceil(k / gran_k)] float32, powers of two; or int32 words of four of their codes.
      gran_k: 32 or 128; None: the shape of the scales tells.
    """
    depth = 2 * values.shape[-1]
    per_word = WORD if scales.dtype == np.int32 else 1
    counts = {gran: -(-depth // (gran * per_word)) for gran in (BLOCK, 4 * BLOCK)}
    fits = [gran for gran, count in counts.items() if scales.shape == (*values.shape[:-1], count)]
    fits = [gran for gran in fits if gran_k in (None, gran)]
    if not fits or scales.dtype not in (np.dtype(np.int32), np.dtype(np.float32)):
        need = [[*values.shape[:-1], count] for gran, count in counts.items() if gran_k in (None, gran)]
        shapes = " or ".join(map(str, need)) or "of 32 or 128 columns"
        raise ValueError(
            f"{op}: scales of {name} are {describe(scales)} for FP4 values {list(values.shape)}, need "
            f"float32 or int32 {shapes}, a scale for each row and 32 columns (or 128)."
        )
    codes = _codes(jnp.asarray(scales), -(-depth // fits[0]))
    return prepare_fp4((values, jnp.repeat(codes, fits[0] // BLOCK, axis=-1)[..., : depth // BLOCK]))


def _codes(scales: jax.Array, count: int) -> jax.Array:
    """uint8 codes, one for each scale."""
    if scales.dtype != np.int32:
        missing = [(0, 0)] * (scales.ndim - 1) + [(0, -count % WORD)]
        scales = pack_ue8m0_to_int(jnp.pad(scales, missing))
    return lax.bitcast_convert_type(scales, jnp.uint8).reshape(*scales.shape[:-1], -1)[..., :count]
