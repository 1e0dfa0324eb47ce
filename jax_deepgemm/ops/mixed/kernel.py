"""From the operands of the mixed-input ops to the problem that their kernels solve; operands come prepared as
those of the grouped ops do (ops/grouped/prepare.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS
from jax_deepgemm.ops.mixed.family import FAMILY
from jax_deepgemm.ops.mixed.problem import MixedProblem

_PARTS_OF_A_SEGMENT = 3  # starts | ends | groups


def _sizes(a: Any, avals_out: Sequence[Any]) -> dict[str, Any]:
    out = avals_out[0]
    return {"m": a.shape[-2], "n": out.shape[-1], "k": a.shape[-1], "out": np.dtype(out.dtype).name}


def _dense(avals_in: Sequence[Any], avals_out: Sequence[Any], **_: Any) -> MixedProblem:
    return MixedProblem(**_sizes(avals_in[0], avals_out))


def _rows(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    rows_format: str = "sizes",
    expected_m: int | None = None,
    **_: Any,
) -> MixedProblem:
    a, _scales, slabs, sizes, _offset = avals_in
    segmented = batch is not None or rows_format == "segments"
    segments = sizes.shape[0] // _PARTS_OF_A_SEGMENT if segmented else sizes.shape[0]
    expected = expected_m or max(1, a.shape[0] // max(1, segments))
    return MixedProblem(
        grouping=ROWS,
        groups=slabs.shape[0],
        expected=expected,
        segments=segments,
        segmented=segmented,
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
    a, _scales, slabs, _counts = avals_in
    return MixedProblem(
        grouping=MASKED_ROWS,
        groups=a.shape[0],
        expected=expected_m or a.shape[1],
        segments=a.shape[0],
        weights=slabs.shape[0],
        zero_rows=zero_rows,
        **_sizes(a, avals_out),
    )


_SCALED = ("a", "a_scales", "slabs")

mixed_gemm = OpKernel(FAMILY, _dense, _SCALED)
"""a [m, k], scales [m, kb], slabs [n / 64, kb, bytes]."""
m_grouped_mixed_gemm = OpKernel(FAMILY, _rows, (*_SCALED, "group_sizes", "group_offset"))
"""a [m, k], scales [m, kb], slabs [g, n / 64, kb, bytes], sizes or segments, offset."""
m_masked_mixed_gemm = OpKernel(FAMILY, _masked, (*_SCALED, "group_sizes"))
"""a [g, m, k], scales [g, m, kb], slabs [weights, n / 64, kb, bytes], masked_m [g]."""
