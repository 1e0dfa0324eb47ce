"""Quantising an indexer's rows: problem -> source text and LaunchPlan;
include/jax_deepgemm/indexer_quantize/rotate.cuh says how."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Copy, Launch, LaunchPlan, Operand, Param, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.indexer_quantize.problem import SCALE_BYTES, RotateProblem

THREADS, HELD, WIDE = 256, 4, 8

# include/jax_deepgemm/indexer_quantize/rotate.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/indexer_quantize/rotate.cuh>

struct Config {{
  using In = {dtype};
  static constexpr int D = {depth};
  static constexpr bool ROTATED = {rotate}, POWERS = {powers}, SLOTS = {slots};
}};

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const {dtype}* x, {given}char* values, char* scales, int rows, int page, int capacity,
    jdg::i64 value_page, jdg::i64 scale_page) {{
  jdg::rotate_rows<Config>(x, rows, {{values, scales, {where}, value_page, scale_page, page, capacity}});
}}
"""
_TYPES = {"bfloat16": "jdg::bf16", "float16": "jdg::f16", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def kernel_source(p: RotateProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all numbers of rows and caches."""
    slots = p.pages > 0
    parts = ["jdg_indexer_quantize", _SHORT[p.dtype], f"d{p.depth}"]
    flags = {"rotate": p.rotate, "powers": p.powers, "slots": slots}
    name = "_".join([*parts, *(name for name, on in flags.items() if on)])
    text = _TEXT.format(
        name=name,
        dtype=_TYPES[p.dtype],
        depth=p.depth,
        threads=THREADS,
        given="const int* slots, " if slots else "",
        where="slots" if slots else "nullptr",
        **{name: str(on).lower() for name, on in flags.items()},
    )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: RotateProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    slots, page_bytes = p.pages > 0, p.page * p.depth
    if p.joined:
        size = page_bytes + SCALE_BYTES * p.page
        places: list[Param] = [Result(0), Result(0, page_bytes)]
        steps, strides = [Copy(Operand(2), Result(0), p.pages * size)], (size, size)
    else:
        places, strides = [Result(0), Result(1)], (page_bytes, SCALE_BYTES * p.page)
        steps = [Copy(Operand(2 + i), Result(i), p.pages * strides[i]) for i in range(2 if slots else 0)]
    sizes = (p.rows, p.page, p.pages * p.page)
    numbers = [Scalar(size, "int32") for size in sizes] + [Scalar(size, "int64") for size in strides]
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(-(-p.rows // (THREADS * WIDE // p.depth * HELD)), 1, 1),
        block=THREADS,
        params=(*map(Operand, range(2 if slots else 1)), *places, *numbers),
    )
    return LaunchPlan((*steps, launch), label=str(p))


KERNELS = Kernels[RotateProblem, None](sources=lambda p, config: [kernel_source(p)], plan=_plan)
