"""Taking rows: problem -> source text and LaunchPlan; include/jax_deepgemm/rows/take.cuh says how."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.rows.problem import RowsProblem

WARPS = 8
MOST_VECTORS = 8
"""Of a lane: 4 KB of a warp are under way at once, of vectors of 16 bytes."""
MOST_PIECES = 65_535

_TEXT = """\
#include <jax_deepgemm/rows/take.cuh>

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const void* from, {scales_from}const int* index, void* to, {scales_to}int rows_from, int rows,
    int vectors, int scale_vectors) {{
  jdg::take<{bytes}, {count}, {warps}, {scale}>(from, {from_scales}, index, to, {to_scales}, rows_from, rows,
                                                vectors, scale_vectors);
}}
"""


class Cut(NamedTuple):
    """How rows are cut: bytes of a vector, and of a vector of scales (0: none), vectors of a lane, warps of a
    row."""

    bytes: int
    scale: int
    held: int
    pieces: int


def vector_bytes(row_bytes: int) -> int:
    """The widest load that divides a row.

    >>> vector_bytes(14336), vector_bytes(24), vector_bytes(7), vector_bytes(0)
    (16, 8, 1, 0)
    """
    return min(row_bytes & -row_bytes, 16)


def cut_of(p: RowsProblem) -> Cut:
    """Pieces of equal length.

    >>> cut_of(RowsProblem(8, 8, 14336)), cut_of(RowsProblem(8, 8, 7168, 224))
    (Cut(bytes=16, scale=0, held=7, pieces=4), Cut(bytes=16, scale=16, held=7, pieces=2))
    """
    wide = vector_bytes(p.row_bytes)
    lanes = -(-p.row_bytes // (32 * wide))  # vectors of a lane that had the whole row
    pieces = -(-lanes // MOST_VECTORS)
    return Cut(wide, vector_bytes(p.scale_bytes), -(-lanes // pieces), pieces)


def _refusal(p: RowsProblem) -> str:
    pieces = cut_of(p).pieces
    return f"a row has {pieces} pieces, at most {MOST_PIECES}" if pieces > MOST_PIECES else ""


def kernel_source(p: RowsProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all rows that are cut alike."""
    cut, scaled = cut_of(p), p.scale_bytes > 0
    name = f"jdg_take_rows_{cut.bytes}x{cut.held}" + f"_scales{cut.scale}" * scaled
    text = _TEXT.format(
        name=name,
        threads=32 * WARPS,
        warps=WARPS,
        bytes=cut.bytes,
        count=cut.held,
        scale=cut.scale,
        scales_from="const void* scales, " * scaled,
        scales_to="void* to_scales, " * scaled,
        from_scales="scales" if scaled else "nullptr",
        to_scales="to_scales" if scaled else "nullptr",
    )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: RowsProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    cut = cut_of(p)
    scale_vectors = p.scale_bytes // cut.scale if cut.scale else 0
    buffers: list[Param] = [*map(Operand, range(len(given)))]
    buffers += [Result(i) for i in range(2 if cut.scale else 1)]
    sizes = (p.rows_from, p.rows, p.row_bytes // cut.bytes, scale_vectors)
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(-(-p.rows // WARPS), cut.pieces, 1),
        block=32 * WARPS,
        params=(*buffers, *(Scalar(size, "int32") for size in sizes)),
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[RowsProblem, None](
    sources=lambda p, config: [kernel_source(p)], plan=_plan, refusal=_refusal
)
