"""MixedProblem + MixedConfig -> LaunchPlan: tensor maps, grid and scalars of one launch."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, TensorMap
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS
from jax_deepgemm.ops.mixed.problem import BOX_K, BOX_ROWS, MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import (
    SLAB_ROW_BYTES,
    SLAB_ROWS,
    TOKEN_ROW_BYTES,
    MixedConfig,
    height,
    shared_memory,
)
from jax_deepgemm.ops.mixed.sm90.source import INTEGERS, described, mixed_source


def _tokens_map(p: MixedProblem, c: MixedConfig, index: int) -> TensorMap:
    """A map (k, rows, groups), of boxes of a block of k of a tile's tokens."""
    matrices = p.groups if p.grouping == MASKED_ROWS else 1
    dtype, size = ("uint8", 1) if p.scaled_tokens else ("bfloat16", 2)
    strides = (p.k * size, p.m * p.k * size)
    box = (TOKEN_ROW_BYTES // size, 64 if c.staged else c.tokens, 1)
    return TensorMap(Operand(index), dtype, (p.k, p.m, matrices), strides, box, 128)


def _boxes_map(p: MixedProblem, index: int) -> TensorMap:
    """A map (n, k, groups) of a weight in bytes, of boxes of what a warpgroup multiplies at a time."""
    matrices = {ROWS: p.groups, MASKED_ROWS: p.weights}.get(p.grouping, 1)
    strides = (p.n, p.n * p.k)
    return TensorMap(Operand(index), "uint8", (p.n, p.k, matrices), strides, (BOX_ROWS, BOX_K, 1), 128)


def _result_map(p: MixedProblem) -> TensorMap:
    """A map (n, rows, groups) of D, of boxes of what a warp stores at a time."""
    matrices, size = (p.groups if p.grouping == MASKED_ROWS else 1), (2 if p.out == "bfloat16" else 4)
    strides, box = (p.n * size, p.m * p.n * size), (SLAB_ROW_BYTES // size, SLAB_ROWS, 1)
    return TensorMap(Result(0), p.out, (p.n, p.m, matrices), strides, box, 128)


def _grid(p: MixedProblem, c: MixedConfig, chip: Chip) -> int:
    rows = p.groups * p.m if p.grouping == MASKED_ROWS else p.m
    edges = {ROWS: p.segments + 1, MASKED_ROWS: p.groups}.get(p.grouping, 0)
    tiles = (ceil_div(rows, c.tokens) + edges) * ceil_div(p.n, height(p, c))
    return tiles * c.split_k if c.split_k > 1 else min(tiles, chip.num_sms * c.blocks_per_sm)


def mixed_plan(p: MixedProblem, c: MixedConfig, chip: Chip, operands: Operands) -> LaunchPlan:
    integers = {
        "m": p.m,
        "n": p.n,
        "k_blocks": p.k_blocks,
        "stripe": 1 if c.staged and not p.dense else max(1, min(ceil_div(p.m, c.tokens), 8)),
        "total": p.segments,
        "here": p.groups,
        "weights": p.weights,
    }
    index = {part: given.index for part, given in operands.items()}
    maps = [_tokens_map(p, c, index["a"]), *([] if p.in_slabs else [_boxes_map(p, index["w"])])]
    maps += [_result_map(p)] if c.staged else []
    parts = (*(("scales",) if "scales" in index else ()), *(("w",) if p.in_slabs else ()))
    pointers = [Operand(index[part]) for part in parts]
    groups = [Operand(index[part]) for part in described(p)]
    scalars = (Scalar(integers[name], "int32") for name in INTEGERS)
    launch = Launch(
        kernel=compile_kernel(mixed_source(p, c), arch=chip.arch),
        grid=(_grid(p, c, chip), 1, 1),
        block=c.threads,
        params=(*maps, *pointers, Result(0), *groups, *scalars),
        cluster=c.split_k,
        shared_memory=shared_memory(p, c),
    )
    return LaunchPlan((launch,), label=str(p))
