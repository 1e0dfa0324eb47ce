"""GroupedProblem + Sm90Config -> LaunchPlan: tensor maps, grid and scalars of one launch."""

from __future__ import annotations

from dataclasses import replace

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, TensorMap
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, shared_memory
from jax_deepgemm.ops.gemm.sm90.plan import GemmOperands, copy_of_c, pointers, stripe_height, tensor_maps
from jax_deepgemm.ops.grouped.problem import ROWS, GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import halves
from jax_deepgemm.ops.grouped.sm90.source import (
    INDEXED_INTEGERS,
    grouped_source,
    has_offset,
    integers,
    map_names,
    unmapped,
)

_DESCRIBED = ("group_sizes", "group_offset")
_ROW_WEIGHTS, _BIAS, _INDEX = "row_weights", "bias", "index"


def grouped_plan(p: GroupedProblem, c: Sm90Config, chip: Chip, operands: Operands) -> LaunchPlan:
    """One launch that computes `p` with `c`."""
    beside = (*_DESCRIBED, _ROW_WEIGHTS, _INDEX, *((_BIAS,) if p.swiglu else ()))
    x = GemmOperands(**{part: one for part, one in operands.items() if part not in beside})
    lead = () if p.grouping == ROWS else (p.groups,)
    maps = tensor_maps(p.gemm, c, x, (*lead, p.m, p.gemm.columns))
    buffers: list[Operand | Result] = [*pointers(p.gemm, x)]
    if p.gated:
        maps = _gated_maps(maps, p.gemm.is_fp8)
    if p.swiglu:
        given = (_ROW_WEIGHTS, _BIAS) if p.biased else (_ROW_WEIGHTS,)
        buffers = [Result(0), Result(1), *(Operand(operands[part].index) for part in given)]
    rows: dict[str, int] = {}
    if p.by_index:
        maps, indexed, rows = _by_index(p, maps, operands)
        buffers += indexed
    described = _DESCRIBED if has_offset(p) else _DESCRIBED[:1]
    groups = [Operand(operands[part].index) for part in described if part in operands]
    values = {
        "m": p.m,
        "n": p.n,
        "k_blocks": ceil_div(p.k, p.gemm.block_k),
        "stripe": stripe_height(p.gemm, c, chip),
        "total": p.segments,
        "here": p.groups,
        "weights": p.weights,
        "extent": p.k if p.inner else p.m,
        **rows,
    }
    scalars = (Scalar(values[name], "int32") for name in integers(p))
    most_rows = ceil_div(p.rows_bound, c.block_m) + (p.segments + 1 if p.grouping == ROWS else p.groups)
    most_tiles = most_rows * ceil_div(p.n, c.block_n) * (2 if halves(p, c) else 1)
    launch = Launch(
        kernel=compile_kernel(grouped_source(p, c), arch=chip.arch),
        grid=(min(most_tiles, chip.num_sms), 1, 1),
        block=c.threads,
        params=(*maps, *buffers, *groups, *scalars),
        shared_memory=shared_memory(p.gemm, c).total,
    )
    return LaunchPlan((*copy_of_c(p.gemm, x.c, p.groups), launch), label=str(p))


def _by_index(
    p: GroupedProblem, maps: list[TensorMap], operands: Operands
) -> tuple[list[TensorMap], list[Operand | Result], dict[str, int]]:
    """The maps without those of the operand whose rows an index names, and what the kernel has instead."""
    left = [one for name, one in zip(map_names(p), maps, strict=False) if name not in unmapped(p)]
    values, scales = operands[p.by_index], operands.get(f"{p.by_index}_scales")
    parts = [values, *([scales] if scales else []), operands[_INDEX]]
    rows, columns = values.shape
    sizes = (rows, columns * (1 if p.gemm.is_fp8 else 2), scales.shape[1] if scales else 0)
    return left, [Operand(one.index) for one in parts], dict(zip(INDEXED_INTEGERS, sizes, strict=True))


def _gated_maps(maps: list[TensorMap], scaled: bool) -> list[TensorMap]:
    """The maps with gate | up as a dimension of its own in those of B and its scales: a box has as many
    features of each half."""
    of_b = (1, 3) if scaled else (1,)
    return [_in_halves(one) if i in of_b else one for i, one in enumerate(maps)]


def _in_halves(whole: TensorMap) -> TensorMap:
    (k, rows, groups), (row, matrix) = whole.dims, whole.strides
    columns, height, _ = whole.box
    half = rows // 2
    return replace(
        whole,
        dims=(k, half, 2, groups),
        strides=(row, half * row, matrix),
        box=(columns, height // 2, 2, 1),
    )
