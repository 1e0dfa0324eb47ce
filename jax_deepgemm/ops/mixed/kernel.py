"""From the operands of the mixed-input ops to the problem that their kernels solve; operands come prepared as
those of the grouped ops do (ops/grouped/prepare.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS
from jax_deepgemm.ops.mixed.family import FAMILY
from jax_deepgemm.ops.mixed.problem import E4M3, FP4, FP4_BF16, INT8, NVFP4, NVFP4_SLAB_BYTES, MixedProblem

_PARTS_OF_A_SEGMENT = 3  # starts | ends | groups
_BYTES = {"int8": INT8, "float8_e4m3fn": E4M3}


def _sizes(a: Any, avals_out: Sequence[Any]) -> dict[str, Any]:
    out = avals_out[0]
    return {"m": a.shape[-2], "n": out.shape[-1], "k": a.shape[-1], "out": np.dtype(out.dtype).name}


def _weight(w: Any, *scales: Any) -> dict[str, Any]:
    """What a weight in slabs, or in bytes, and the scales are."""
    if not scales:
        return {"weights_in": NVFP4 if w.shape[-1] == NVFP4_SLAB_BYTES else FP4_BF16}
    weights_in = _BYTES.get(np.dtype(w.dtype).name, FP4)
    return {"weights_in": weights_in, "scales": np.dtype(scales[0].dtype).name}


def _dense(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> MixedProblem:
    a, *scales, w = avals_in
    return MixedProblem(**_weight(w, *scales), **_sizes(a, avals_out))


def _rows(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    rows_format: str = "sizes",
    expected_m: int | None = None,
    **_: Any,
) -> MixedProblem:
    a, *scales, w, sizes, _offset = avals_in
    segmented = batch is not None or rows_format == "segments"
    segments = sizes.shape[0] // _PARTS_OF_A_SEGMENT if segmented else sizes.shape[0]
    expected = expected_m or max(1, a.shape[0] // max(1, segments))
    return MixedProblem(
        grouping=ROWS,
        groups=w.shape[0],
        expected=expected,
        segments=segments,
        segmented=segmented,
        **_weight(w, *scales),
        **_sizes(a, avals_out),
    )


def _masked(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    expected_m: int | None = None,
    zero_rows: bool = False,
    **_: Any,
) -> MixedProblem:
    a, *scales, w, _counts = avals_in
    return MixedProblem(
        grouping=MASKED_ROWS,
        groups=a.shape[0],
        expected=expected_m or a.shape[1],
        segments=a.shape[0],
        weights=w.shape[0],
        zero_rows=zero_rows,
        **_weight(w, *scales),
        **_sizes(a, avals_out),
    )


_OPERANDS = ("a", "scales", "w")

mixed_gemm = OpKernel(FAMILY, _dense, _OPERANDS)
"""a [m, k], its scales [m, kb], slabs [n / 64, kb, bytes]; or the scales of w [n], and w [k, n]."""
m_grouped_mixed_gemm = OpKernel(FAMILY, _rows, (*_OPERANDS, "group_sizes", "group_offset"))
"""a [m, k], its scales [m, kb], slabs [g, n / 64, kb, bytes], sizes or segments, offset; or the scales of w
[g, n], and w [g, k, n]."""
m_masked_mixed_gemm = OpKernel(FAMILY, _masked, (*_OPERANDS, "group_sizes"))
"""a [g, m, k], its scales [g, m, kb], slabs [weights, n / 64, kb, bytes], masked_m [g]; or the scales of w
[weights, n], and w [weights, k, n]."""

_PLAIN = ("a", "w")

mixed_bf16_gemm = OpKernel(FAMILY, _dense, _PLAIN)
"""a bfloat16 [m, k], slabs [n / 64, kb, bytes]."""
m_grouped_mixed_bf16_gemm = OpKernel(FAMILY, _rows, (*_PLAIN, "group_sizes", "group_offset"))
"""a bfloat16 [m, k], slabs [g, n / 64, kb, bytes], sizes or segments, offset."""
m_masked_mixed_bf16_gemm = OpKernel(FAMILY, _masked, (*_PLAIN, "group_sizes"))
"""a bfloat16 [g, m, k], slabs [weights, n / 64, kb, bytes], masked_m [g]."""
