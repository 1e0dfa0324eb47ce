"""From the operands of the grouped ops to the problem that their kernels solve.

Operands come prepared: without vmap's dimensions (a batch is more segments), padded for TMA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.gemm.kernel import Finished, finished_problem, scales_of, type_name
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped.family import FAMILY
from jax_deepgemm.ops.grouped.problem import INNER, MASKED_INNER, MASKED_ROWS, ROWS, GroupedProblem

_PARTS_OF_A_SEGMENT = 3  # starts | ends | groups


def _segments(sizes: Any, rows_format: str, batch: Any) -> dict[str, Any]:
    segmented = batch is not None or rows_format == "segments"
    count = sizes.shape[0] // _PARTS_OF_A_SEGMENT if segmented else sizes.shape[0]
    return {"segments": count, "segmented": segmented}


def _out(avals_out: Sequence[Any]) -> dict[str, Any]:
    return {"out": np.dtype(avals_out[0].dtype).name}


def _fp8(a: Any, b: Any, sb: Any, step: int = SCALE_BLOCK) -> dict[str, Any]:
    """Scales of one row have a row for each of B's; where both forms have one row they mean the same."""
    per_row = sb.shape[-2] == b.shape[-2] and b.shape[-2] > 1
    return {"a": type_name(a), "b": type_name(b), "b_scales": scales_of(per_row, step)}


def _bf16(layout: str) -> dict[str, Any]:
    return {"a": "bf16", "b": "bf16", "layout": layout, "b_scales": "none"}


def _rows_problem(
    a: Any, b: Any, avals_out: Sequence[Any], expected_m: int | None, described: dict[str, Any]
) -> GroupedProblem:
    """Without a hint, the rows are taken to be shared evenly by all groups there are."""
    rows, k = a.shape
    expected = min(expected_m or max(1, rows // max(1, described["segments"])), rows)
    n = avals_out[0].shape[-1]
    return GroupedProblem(
        ROWS, groups=b.shape[0], m=rows, n=n, k=k, expected=expected, **described, **_out(avals_out)
    )


def _m_grouped_fp8(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    rows_format: str = "sizes",
    expected_m: int | None = None,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> GroupedProblem:
    a, _sa, b, sb, sizes, _offset = avals_in
    described = _segments(sizes, rows_format, batch) | _fp8(a, b, sb, step)
    return _rows_problem(a, b, avals_out, expected_m, described)


def _m_grouped_bf16(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    layout: str,
    rows_format: str = "sizes",
    expected_m: int | None = None,
    **_: Any,
) -> GroupedProblem:
    a, b, sizes, _offset = avals_in
    return _rows_problem(a, b, avals_out, expected_m, _segments(sizes, rows_format, batch) | _bf16(layout))


def _masked_problem(
    a: Any,
    b: Any,
    avals_out: Sequence[Any],
    expected_m: int | None,
    zero_rows: bool,
    types: dict[str, Any],
) -> GroupedProblem:
    """a [g, m, k]; b [weights, ...] serves group g modulo weights."""
    groups, rows, k = a.shape
    return GroupedProblem(
        MASKED_ROWS,
        groups=groups,
        m=rows,
        n=avals_out[0].shape[-1],
        k=k,
        expected=min(expected_m or rows, rows),
        segments=groups,
        weights=b.shape[0],
        zero_rows=zero_rows,
        **_out(avals_out),
        **types,
    )


def _m_masked_fp8(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    expected_m: int | None = None,
    zero_rows: bool = False,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> GroupedProblem:
    del batch
    a, _sa, b, sb, _masked = avals_in
    return _masked_problem(a, b, avals_out, expected_m, zero_rows, _fp8(a, b, sb, step))


def _m_masked_bf16(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: Any,
    layout: str,
    expected_m: int | None = None,
    zero_rows: bool = False,
    **_: Any,
) -> GroupedProblem:
    del batch
    a, b, _masked = avals_in
    return _masked_problem(a, b, avals_out, expected_m, zero_rows, _bf16(layout))


def _inner_problem(
    avals_out: Sequence[Any], k: int, add_c: bool, described: dict[str, Any]
) -> GroupedProblem:
    *groups, m, n = avals_out[0].shape
    expected = max(1, k // max(1, described["segments"]))
    return GroupedProblem(
        INNER,
        groups=math.prod(groups),
        m=m,
        n=n,
        k=k,
        expected=expected,
        add_c=add_c,
        **_out(avals_out),
        **described,
    )


def _k_grouped_fp8(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: Any, rows_format: str = "sizes", **_: Any
) -> GroupedProblem:
    a, _sa, b, sb, sizes, _offset, *c = avals_in
    b_scales = "slices" if sb.shape[1] >= b.shape[0] else "block_slices"
    types = {"a": type_name(a), "b": type_name(b), "b_scales": b_scales}
    described = _segments(sizes, rows_format, batch) | {"whole_blocks": rows_format == "blocks"}
    return _inner_problem(avals_out, a.shape[1], bool(c), described | types)


def _k_grouped_bf16(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: Any, rows_format: str = "sizes", **_: Any
) -> GroupedProblem:
    a, _b, sizes, _offset, *c = avals_in
    return _inner_problem(avals_out, a.shape[0], bool(c), _segments(sizes, rows_format, batch) | _bf16("tn"))


def _k_masked_bf16(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, batch: Any, **_: Any
) -> GroupedProblem:
    del batch
    groups, k, _m = avals_in[0].shape
    *_lead, m, n = avals_out[0].shape
    counts: dict[str, Any] = {"groups": groups, "segments": groups, "weights": groups}
    sizes: dict[str, Any] = {"m": m, "n": n, "k": k, "expected": k}
    return GroupedProblem(MASKED_INNER, **counts, **sizes, **_out(avals_out), **_bf16("tn"))


def _gated(plain: GroupedProblem, bias: Sequence[Any]) -> GroupedProblem:
    """Of a problem whose result is [.., features]: B has gate and up of them."""
    return dataclasses.replace(plain, n=2 * plain.n, out="bfloat16", gated=True, biased=bool(bias))


def _m_grouped_swiglu(avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> GroupedProblem:
    scaled, (_weights, sizes, offset, *bias) = avals_in[:4], avals_in[4:]
    return _gated(_m_grouped_fp8((*scaled, sizes, offset), avals_out, **params), bias)


def _m_masked_swiglu(avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> GroupedProblem:
    scaled, (_weights, counts, *bias) = avals_in[:4], avals_in[4:]
    return _gated(_m_masked_fp8((*scaled, counts), avals_out, **params), bias)


def _named(x: Any, index: Any) -> Any:
    """The type of rows that an index names."""
    return jax.ShapeDtypeStruct((*index.shape, *x.shape[1:]), x.dtype)


def _m_gathered_fp8(avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> GroupedProblem:
    a, sa, b, sb, index, *groups = avals_in
    plain = _m_grouped_fp8((_named(a, index), sa, b, sb, *groups), avals_out, **params)
    return dataclasses.replace(plain, by_index="a")


def _m_gathered_bf16(avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> GroupedProblem:
    a, b, index, *groups = avals_in
    plain = _m_grouped_bf16((_named(a, index), b, *groups), avals_out, **params)
    return dataclasses.replace(plain, by_index="a")


def _k_gathered_bf16(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, side: str, **params: Any
) -> GroupedProblem:
    a, b, index, *groups = avals_in
    plain = _k_grouped_bf16((_named(a, index), b, *groups), avals_out, **params)
    return dataclasses.replace(plain, by_index=side)


_SCALED = ("a", "a_scales", "b", "b_scales")

m_grouped_fp8_gemm = OpKernel(FAMILY, _m_grouped_fp8, (*_SCALED, "group_sizes", "group_offset"))
"""a [m, k], scales [m, kb], b [g, n, k], scales, sizes or segments, offset."""
m_grouped_bf16_gemm = OpKernel(FAMILY, _m_grouped_bf16, ("a", "b", "group_sizes", "group_offset"))
"""a [m, k], b [g, n, k] (layout "nt") or [g, k, n] ("nn"), sizes or segments, offset."""
m_masked_fp8_gemm = OpKernel(FAMILY, _m_masked_fp8, (*_SCALED, "group_sizes"))
"""a [g, m, k], scales [g, m, kb], b [weights, n, k], scales, masked_m [g]."""
m_grouped_fp8_gemm_swiglu = OpKernel(
    FAMILY, _m_grouped_swiglu, (*_SCALED, "row_weights", "group_sizes", "group_offset", "bias")
)
"""a [m, k], scales [m, kb], b [g, 2 f, k], scales, row weights [m], sizes or segments, offset(, bias
[g, 2 f])."""
m_masked_fp8_gemm_swiglu = OpKernel(
    FAMILY, _m_masked_swiglu, (*_SCALED, "row_weights", "group_sizes", "bias")
)
"""a [g, m, k], scales [g, m, kb], b [weights, 2 f, k], scales, row weights [g, m], masked_m [g](, bias)."""
m_masked_bf16_gemm = OpKernel(FAMILY, _m_masked_bf16, ("a", "b", "group_sizes"))
"""a [g, m, k], b [weights, n, k] or [weights, k, n], masked_m [g]."""
m_grouped_fp8_finished = Finished(
    FAMILY, finished_problem(_m_grouped_fp8, 6), (*_SCALED, "group_sizes", "group_offset")
)
m_grouped_bf16_finished = Finished(
    FAMILY, finished_problem(_m_grouped_bf16, 4), ("a", "b", "group_sizes", "group_offset")
)
m_masked_fp8_finished = Finished(FAMILY, finished_problem(_m_masked_fp8, 5), (*_SCALED, "group_sizes"))
m_masked_bf16_finished = Finished(FAMILY, finished_problem(_m_masked_bf16, 3), ("a", "b", "group_sizes"))
"""The kernels of the ops of finished.py: the same, then alpha [1] and a bias [groups of b, n]."""
k_grouped_fp8_gemm = OpKernel(FAMILY, _k_grouped_fp8, (*_SCALED, "group_sizes", "group_offset", "c"))
"""a [m, k], scales [kb, m], b [n, k], scales [kb, n] or [kb, nb], sizes or segments, offset(, c)."""
k_grouped_bf16_gemm = OpKernel(FAMILY, _k_grouped_bf16, ("a", "b", "group_sizes", "group_offset", "c"))
"""a [k, m], b [k, n], sizes or segments, offset(, c)."""
m_gathered_fp8_gemm = OpKernel(FAMILY, _m_gathered_fp8, (*_SCALED, "index", "group_sizes", "group_offset"))
"""a [t, k], scales [t, kb], b [g, n, k], scales, index [m], sizes or segments, offset."""
m_gathered_bf16_gemm = OpKernel(FAMILY, _m_gathered_bf16, ("a", "b", "index", "group_sizes", "group_offset"))
"""a [t, k], b [g, n, k] (layout "nt") or [g, k, n] ("nn"), index [m], sizes or segments, offset."""
k_gathered_bf16_gemm = OpKernel(
    FAMILY, _k_gathered_bf16, ("a", "b", "index", "group_sizes", "group_offset", "c")
)
"""a [r, m] and b [k, n] (side "a"), or a [k, m] and b [r, n] ("b"), index [k], sizes or segments,
offset(, c)."""
k_masked_bf16_gemm = OpKernel(FAMILY, _k_masked_bf16, ("a", "b", "group_sizes"))
"""a [g, k, m], b [g, k, n], sizes [g]."""
