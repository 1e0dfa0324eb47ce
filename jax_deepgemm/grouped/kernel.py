"""The CUDA side of the grouped ops: operand types -> GroupedProblem -> GemmConfig -> LaunchPlan.

Operands come prepared: without vmap's dimensions (a batch is more segments), padded for TMA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_deepgemm.core.launch import LaunchPlan, Operand
from jax_deepgemm.gemm.kernel import type_name
from jax_deepgemm.jit.toolchain import read_settings, say
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import GemmConfig
from jax_deepgemm.sm90.grouped import (
    INNER,
    MASKED_INNER,
    MASKED_ROWS,
    ROWS,
    GroupedProblem,
    choose_grouped,
    grouped_cost,
    grouped_plan,
    with_sms,
)
from jax_deepgemm.sm90.plan import GemmOperands, MatrixOperand

_PARTS_OF_A_SEGMENT = 3  # starts | ends | groups


def _plan(
    problem: GroupedProblem,
    avals_in: Sequence[Any],
    parts: Sequence[str],
    config: GemmConfig | None,
    chip: Chip,
    num_sms: int | None,
) -> LaunchPlan:
    """The plan of operands that play these parts, in order."""
    chip = with_sms(chip, num_sms)
    chosen = config or choose_grouped(problem, chip)
    if read_settings().print_configs:
        say(f"{problem}: {chosen}, {'given' if config else grouped_cost(problem, chosen, chip)}")
    index = {part: i for i, part in enumerate(parts) if i < len(avals_in)}
    matrices = {
        part: MatrixOperand(i, tuple(avals_in[i].shape))
        for part, i in index.items()
        if part not in ("sizes", "offset")
    }
    offset = Operand(index["offset"]) if "offset" in index else None
    return grouped_plan(problem, chosen, chip, GemmOperands(**matrices), Operand(index["sizes"]), offset)


def _segments(sizes: Any, layout: str, batch: Any) -> tuple[int, bool]:
    segmented = batch is not None or layout == "segments"
    return (sizes.shape[0] // _PARTS_OF_A_SEGMENT if segmented else sizes.shape[0]), segmented


def _out(aval: Any) -> str:
    return np.dtype(aval.dtype).name


def _b_scales(b: Any, sb: Any) -> str:
    """Scales of 1x128 have a row for each of B's; where both forms have one row they mean the same."""
    return "vector" if sb.shape[-2] == b.shape[-2] and b.shape[-2] > 1 else "block"


def _rows_problem(
    a: Any,
    b: Any,
    avals_out: Sequence[Any],
    segments: tuple[int, bool],
    expected_m: int | None,
    types: dict[str, str],
) -> GroupedProblem:
    """Without a hint, the rows are taken to be shared evenly by all groups there are."""
    rows, k = a.shape
    count, segmented = segments
    return GroupedProblem(
        ROWS,
        groups=b.shape[0],
        m=rows,
        n=avals_out[0].shape[-1],
        k=k,
        expected=expected_m or max(1, rows // max(1, count)),
        segments=count,
        segmented=segmented,
        out=_out(avals_out[0]),
        **types,
    )


def m_grouped_fp8_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    layout: str = "sizes",
    expected_m: int | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [m, k], scales [m, kb], b [g, n, k], scales, sizes or segments, offset."""
    a, _sa, b, sb, sizes, _offset = avals_in
    types = {"a": type_name(a), "b": type_name(b), "b_scales": _b_scales(b, sb)}
    problem = _rows_problem(a, b, avals_out, _segments(sizes, layout, batch), expected_m, types)
    parts = ("a", "a_scales", "b", "b_scales", "sizes", "offset")
    return _plan(problem, avals_in, parts, config, chip, num_sms)


def m_grouped_bf16_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    form: str,
    layout: str = "sizes",
    expected_m: int | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [m, k], b [g, n, k] ("nt") or [g, k, n] ("nn"), sizes or segments, offset."""
    a, b, sizes, _offset = avals_in
    segments = _segments(sizes, layout, batch)
    problem = _rows_problem(a, b, avals_out, segments, expected_m, _bf16(form))
    return _plan(problem, avals_in, ("a", "b", "sizes", "offset"), config, chip, num_sms)


def _bf16(layout: str) -> dict[str, str]:
    return {"a": "bf16", "b": "bf16", "layout": layout, "b_scales": "none"}


def _masked_problem(
    a: Any, b: Any, avals_out: Sequence[Any], expected_m: int | None, zero_rows: bool, types: dict[str, str]
) -> GroupedProblem:
    """a [g, m, k]; b [weights, ...] serves group g modulo weights."""
    return GroupedProblem(
        MASKED_ROWS,
        groups=a.shape[0],
        m=a.shape[1],
        n=avals_out[0].shape[-1],
        k=a.shape[2],
        expected=min(expected_m or a.shape[1], a.shape[1]),
        segments=a.shape[0],
        weights=b.shape[0],
        zero_rows=zero_rows,
        out=_out(avals_out[0]),
        **types,
    )


def m_masked_fp8_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    expected_m: int | None = None,
    zero_rows: bool = False,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [g, m, k], scales [g, m, kb], b [weights, n, k], scales, masked_m [g]."""
    del batch
    a, _sa, b, sb, _masked = avals_in
    types = {"a": type_name(a), "b": type_name(b), "b_scales": _b_scales(b, sb)}
    problem = _masked_problem(a, b, avals_out, expected_m, zero_rows, types)
    return _plan(problem, avals_in, ("a", "a_scales", "b", "b_scales", "sizes"), config, chip, num_sms)


def m_masked_bf16_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    form: str,
    expected_m: int | None = None,
    zero_rows: bool = False,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [g, m, k], b [weights, n, k] ("nt") or [weights, k, n] ("nn"), masked_m [g]."""
    del batch
    a, b, _masked = avals_in
    problem = _masked_problem(a, b, avals_out, expected_m, zero_rows, _bf16(form))
    return _plan(problem, avals_in, ("a", "b", "sizes"), config, chip, num_sms)


def k_grouped_fp8_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    layout: str = "sizes",
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [m, k], scales [kb, m], b [n, k], scales [kb, n], sizes or segments, offset(, c)."""
    a, _sa, b = avals_in[:3]
    types = {"a": type_name(a), "b": type_name(b), "b_scales": "slices"}
    problem = _inner_problem(avals_in, avals_out, avals_in[4], a.shape[1], layout, batch, 6, types)
    parts = ("a", "a_scales", "b", "b_scales", "sizes", "offset", "c")
    return _plan(problem, avals_in, parts, config, chip, num_sms)


def k_grouped_bf16_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    layout: str = "sizes",
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [k, m], b [k, n], sizes or segments, offset(, c)."""
    a = avals_in[0]
    problem = _inner_problem(avals_in, avals_out, avals_in[2], a.shape[0], layout, batch, 4, _bf16("tn"))
    return _plan(problem, avals_in, ("a", "b", "sizes", "offset", "c"), config, chip, num_sms)


def _inner_problem(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    sizes: Any,
    k: int,
    layout: str,
    batch: Any,
    operands: int,
    types: dict[str, str],
) -> GroupedProblem:
    *groups, m, n = avals_out[0].shape
    segments, segmented = _segments(sizes, layout, batch)
    return GroupedProblem(
        INNER,
        groups=math.prod(groups),
        m=m,
        n=n,
        k=k,
        expected=max(1, k // max(1, segments)),
        segments=segments,
        segmented=segmented,
        out=_out(avals_out[0]),
        add_c=len(avals_in) > operands,
        **types,
    )


def k_masked_bf16_gemm(
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    *,
    batch: tuple[bool, ...] | None,
    chip: Chip,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
    **_: Any,
) -> LaunchPlan:
    """Operands a [g, k, m], b [g, k, n], sizes [g]."""
    del batch
    a, _b, _sizes = avals_in
    *_lead, m, n = avals_out[0].shape
    problem = GroupedProblem(
        MASKED_INNER,
        groups=a.shape[0],
        m=m,
        n=n,
        k=a.shape[1],
        expected=a.shape[1],
        segments=a.shape[0],
        weights=a.shape[0],
        out=_out(avals_out[0]),
        **_bf16("tn"),
    )
    return _plan(problem, avals_in, ("a", "b", "sizes"), config, chip, num_sms)
