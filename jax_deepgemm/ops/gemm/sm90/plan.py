"""GemmProblem + Sm90Config -> LaunchPlan: tensor maps, grid and scalars of one launch."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Given, Operands
from jax_deepgemm.core.launch import Copy, Launch, LaunchPlan, Operand, Result, Scalar, TensorMap
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.gemm.problem import GemmProblem, ceil_div
from jax_deepgemm.ops.gemm.sm90.config import (
    SLAB_ROW_BYTES,
    SLAB_ROWS,
    Sm90Config,
    scale_blocks,
    shared_memory,
    tma_store,
)
from jax_deepgemm.ops.gemm.sm90.source import coefficients, integers, kernel_source, reads_c, sides

_STRIPE_BYTES = 8 << 20  # rows of A that stay in L2 beside B and D; see docs/performance_log.md


@dataclass(frozen=True)
class GemmOperands:
    """Which operands of the custom call play which part; scales are None for BF16, c without
    accumulation. d: what D's memory holds before, where it has holes."""

    a: Given
    b: Given
    a_scales: Given | None = None
    b_scales: Given | None = None
    c: Given | None = None
    d: Given | None = None
    alpha: Given | None = None
    bias: Given | None = None


def tensor_map(
    base: Operand | Result,
    shape: tuple[int, ...],
    dtype: str,
    size: int,
    box: tuple[int, int],
    swizzle: int,
    batch_axis: int = 0,
) -> TensorMap:
    """A three-dimensional map (columns, rows, batch), also of a batch that is stored behind the rows
    (`batch_axis` 1); boxes that reach outside are filled with zeros."""
    *outer, cols = shape
    outer = outer if len(outer) == 2 else [1, *outer]
    strides = (outer[1] * cols * size, cols * size)  # of the first dimension, of the second
    if batch_axis == 0:
        outer, strides = outer[::-1], strides[::-1]
    return TensorMap(base, dtype, (cols, *outer), strides, (*box, 1), swizzle)


def matrix_map(p: GemmProblem, x: Given, k_major: bool, tile: int, batch_axis: int) -> TensorMap:
    box = (p.block_k, tile) if k_major else (64, 64)
    dtype, size = ("uint8", 1) if p.is_fp8 else ("bfloat16", 2)
    return tensor_map(Operand(x.index), x.shape, dtype, size, box, 128, batch_axis)


def scale_maps(p: GemmProblem, c: Sm90Config, x: GemmOperands) -> list[TensorMap]:
    """Maps of A's and B's scales: a box is what a tile needs for a quad of blocks of k, of slices for one."""
    maps = []
    parts = zip(sides(p), (x.a_scales, x.b_scales), (c.block_m, c.block_n), p.batch_axes, strict=False)
    for side, scales, tile, axis in parts:
        if scales is not None:
            blocks = 4 if p.b_scales != "slices" else 1  # along k
            extent = scale_blocks(p, c) if side.scales in ("block", "block_slices", "block_32") else tile
            box = (extent, blocks) if p.slices else (blocks, extent)
            maps.append(tensor_map(Operand(scales.index), scales.shape, "float32", 4, box, 0, axis))
    return maps


def tensor_maps(p: GemmProblem, c: Sm90Config, x: GemmOperands, result: tuple[int, ...]) -> list[TensorMap]:
    """Maps of A, B, their scales, and D, whose boxes are slabs of the epilogue; see `leading_parameters`."""
    axis_a, axis_b, axis_d = p.batch_axes
    maps = [matrix_map(p, x.a, p.a_k_major, c.block_m, axis_a)]
    maps += [matrix_map(p, x.b, p.b_k_major, c.block_n, axis_b)]
    maps += scale_maps(p, c, x)
    if tma_store(p, c):
        box = (SLAB_ROW_BYTES // p.out_bytes, SLAB_ROWS)
        maps.append(tensor_map(Result(0), result, p.out, p.out_bytes, box, 128, axis_d))
    return maps


def pointers(p: GemmProblem, x: GemmOperands) -> list[Operand | Result]:
    """D, C where the kernel reads it, and what the product meets before it is stored."""
    addend = [Operand(x.c.index)] if x.c and reads_c(p) else []
    results = [Result(0), Result(1)] if p.finish.quantized else [Result(0)]
    return [*results, *addend, *(Operand(getattr(x, name).index) for name in coefficients(p))]


def copy_of_c(p: GemmProblem, c: Given | None, matrices: int) -> list[Copy]:
    """Where the kernel adds to what lies in D: C comes there, if it is not there already."""
    return [] if c is None or not p.reduces else [_copy_to_d(p, c, matrices)]


def _copy_to_d(p: GemmProblem, x: Given, matrices: int) -> Copy:
    return Copy(Operand(x.index), Result(0), matrices * p.m * p.columns * p.out_bytes)


def stripe_height(p: GemmProblem, c: Sm90Config, chip: Chip) -> int:
    """Row tiles walked together: so many that one wave reads the fewest bytes of A and B, up to twice as many
    where their rows of A are small enough to stay in L2, so that B is read from memory less often."""
    best = round((chip.num_sms * c.block_n / c.block_m) ** 0.5)
    in_l2 = _STRIPE_BYTES // max(1, c.block_m * p.row_bytes)
    return max(1, min(ceil_div(p.m, c.block_m), max(best, min(2 * best, in_l2))))


def gemm_plan(p: GemmProblem, c: Sm90Config, chip: Chip, operands: Operands) -> LaunchPlan:
    """One launch that computes `p` with `c`."""
    x = GemmOperands(**operands)
    batch = (p.batches,) if p.batches > 1 else ()
    result = (*batch, p.m, p.columns) if p.batch_axes[2] == 0 else (p.m, p.batches, p.columns)
    maps = tensor_maps(p, c, x, result)
    values = {
        "m": p.m,
        "n": p.n,
        "batches": p.batches,
        "k_blocks": p.k_blocks,
        "stripe": stripe_height(p, c, chip),
        "batched_a": int(x.a.batched),
        "batched_b": int(x.b.batched),
        "batched_a_scales": int(x.a_scales is not None and x.a_scales.batched),
        "batched_b_scales": int(x.b_scales is not None and x.b_scales.batched),
        "batched_c": int(x.c is not None and x.c.batched),
        "batched_alpha": int(x.alpha is not None and x.alpha.batched),
        "batched_bias": int(x.bias is not None and x.bias.batched),
        "run_blocks": p.k_blocks // p.runs,
    }
    tiles = ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * p.batches
    launch = Launch(
        kernel=compile_kernel(kernel_source(p, c), arch=chip.arch),
        grid=(tiles * c.split_k if c.one_tile else min(tiles, chip.num_sms), 1, 1),
        block=c.threads,
        params=(*maps, *pointers(p, x), *(Scalar(values[name], "int32") for name in integers(p))),
        cluster=c.split_k,
        shared_memory=shared_memory(p, c).total,
    )
    before = [_copy_to_d(p, x.d, p.batches)] if x.d is not None else copy_of_c(p, x.c, p.batches)
    return LaunchPlan((*before, launch), label=str(p))
