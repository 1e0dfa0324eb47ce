"""Taking, copying and summing rows: problem -> source text and LaunchPlan; include/jax_deepgemm/rows/ says
how."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.rows.problem import RowsProblem

WARPS = 8
MOST_VECTORS = 8
"""That a lane loads at once: 4 KB of a warp, of vectors of 16 bytes."""
MOST_SUMMED = 2
"""Vectors of sums that a lane has: eight float32 each of bfloat16."""
MOST_PIECES = 65_535

_TAKE = """\
#include <jax_deepgemm/rows/take.cuh>

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const void* from, {scales_from}const int* index, void* to, {scales_to}int rows_from, int rows,
    int vectors, int scale_vectors) {{
  jdg::take<{bytes}, {held}, {warps}, {scale}>(from, {from_scales}, index, to, {to_scales}, rows_from, rows,
                                               vectors, scale_vectors);
}}
"""
_COPY = """\
#include <jax_deepgemm/rows/copy.cuh>

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const void* from, const int* index, const int* position, void* to, int rows_from, int rows, int slots,
    int vectors, int pieces, int share) {{
  jdg::copy_rows<{bytes}, {held}, {warps}>(from, index, position, to, rows_from, rows, slots, vectors, pieces,
                                           share);
}}
"""
_SUM = """\
#include <jax_deepgemm/rows/sum.cuh>
{include}
extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const void* from, const int* index, void* to, int rows_from, int rows, int slots, int vectors,
    int pieces) {{
  {head}jdg::sum_rows<{dtype}, {bytes}, {held}, {slots}, {warps}>(from, index, to, rows_from, rows, slots,
                                                            vectors, pieces);
}}
"""
_TYPES = {"bfloat16": "jdg::bf16", "float16": "jdg::half", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class Cut(NamedTuple):
    """How rows are cut.

    Attributes:
      bytes: of a vector.
      scale: of a vector of scales; 0: none.
      held: vectors of a row that a lane has.
      slots: rows that are loaded at once.
      pieces: warps of a row.
    """

    bytes: int
    scale: int
    held: int
    slots: int
    pieces: int


def vector_bytes(row_bytes: int) -> int:
    """The widest load that divides a row.

    >>> vector_bytes(14336), vector_bytes(24), vector_bytes(7), vector_bytes(0)
    (16, 8, 1, 0)
    """
    return min(row_bytes & -row_bytes, 16)


def cut_of(p: RowsProblem) -> Cut:
    """Pieces of equal length.

    >>> cut_of(RowsProblem(8, 8, 7168, 224))
    Cut(bytes=16, scale=16, held=7, slots=1, pieces=2)
    >>> cut_of(RowsProblem(8, 64, 14336, slots=8, dtype="bfloat16"))
    Cut(bytes=16, scale=0, held=1, slots=8, pieces=28)
    """
    wide, slots = vector_bytes(p.row_bytes), min(max(p.slots, 1), MOST_VECTORS)
    if p.slots and wide < 16:
        wide = 4 if p.dtype == "float32" else 2  # a number at a time
    lanes = -(-p.row_bytes // (32 * wide))  # vectors of a lane that had the whole row
    most = min(MOST_VECTORS // slots, MOST_SUMMED) if p.slots else MOST_VECTORS
    pieces = -(-lanes // most)
    return Cut(wide, vector_bytes(p.scale_bytes), -(-lanes // pieces), slots, pieces)


def _refusal(p: RowsProblem) -> str:
    pieces = cut_of(p).pieces
    return f"a row has {pieces} pieces, at most {MOST_PIECES}" if pieces > MOST_PIECES else ""


def kernel_source(p: RowsProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all rows that are cut alike."""
    source = _sum_source(p) if p.slots else _copy_source(p) if p.copies else _take_source(p)
    return KernelSource(*source, (("problem", str(p)),))


def _take_source(p: RowsProblem) -> tuple[str, str]:
    cut, scaled = cut_of(p), p.scale_bytes > 0
    name = f"jdg_take_rows_{cut.bytes}x{cut.held}" + f"_scales{cut.scale}" * scaled
    text = _TAKE.format(
        name=name,
        threads=32 * WARPS,
        warps=WARPS,
        bytes=cut.bytes,
        held=cut.held,
        scale=cut.scale,
        scales_from="const void* scales, " * scaled,
        scales_to="void* to_scales, " * scaled,
        from_scales="scales" if scaled else "nullptr",
        to_scales="to_scales" if scaled else "nullptr",
    )
    return name, text


def _copy_source(p: RowsProblem) -> tuple[str, str]:
    cut = cut_of(p)
    name = f"jdg_copy_rows_{cut.bytes}x{cut.held}"
    text = _COPY.format(name=name, threads=32 * WARPS, warps=WARPS, bytes=cut.bytes, held=cut.held)
    return name, text


def _sum_source(p: RowsProblem) -> tuple[str, str]:
    cut = cut_of(p)
    name = f"jdg_sum_rows_{_SHORT[p.dtype]}_{cut.bytes}x{cut.held}_slots{cut.slots}"
    name += "_chained" * p.chained
    text = _SUM.format(
        name=name,
        threads=32 * WARPS,
        warps=WARPS,
        include="#include <jax_deepgemm/ptx/barrier.cuh>\n" if p.chained else "",
        head="jdg::ptx::wait_for_previous_kernel();\n  " if p.chained else "",
        dtype=_TYPES[p.dtype],
        bytes=cut.bytes,
        held=cut.held,
        slots=cut.slots,
    )
    return name, text


class _Call(NamedTuple):
    """What a kernel is launched with: blocks of threads, how many operands and results, sizes."""

    grid: tuple[int, int]
    operands: int
    results: int
    sizes: tuple[int, ...]


def _call(p: RowsProblem) -> _Call:
    cut = cut_of(p)
    vectors, pieces = p.row_bytes // cut.bytes, cut.pieces
    if p.slots:
        summed = (p.rows_from, p.rows, p.slots, vectors, pieces)
        return _Call((-(-p.rows // WARPS) * pieces, 1), 2, 1, summed)
    if p.copies:
        share = -(-p.rows // p.rows_from)
        copied = (p.rows_from, p.rows, p.copies, vectors, pieces, share)
        return _Call((-(-p.rows_from // WARPS) * pieces, 1), 3, 1, copied)
    scaled = cut.scale > 0
    sizes = (p.rows_from, p.rows, vectors, p.scale_bytes // cut.scale if scaled else 0)
    return _Call((-(-p.rows // WARPS), pieces), 2 + scaled, 1 + scaled, sizes)


def _plan(p: RowsProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    call = _call(p)
    params: list[Param] = [*map(Operand, range(call.operands)), *map(Result, range(call.results))]
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(*call.grid, 1),
        block=32 * WARPS,
        params=(*params, *(Scalar(size, "int32") for size in call.sizes)),
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[RowsProblem, None](
    sources=lambda p, config: [kernel_source(p)], plan=_plan, refusal=_refusal
)
