"""Norms of rows: problem -> source text and LaunchPlan; include/jax_deepgemm/norm/norm.cuh says how."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.norm.problem import MOST_FEATURES, NormProblem

WIDE, WARP, MOST_CHUNKS = 8, 32, 4
SHORT_THREADS = 128
"""Of a block whose rows have a warp each."""
RESIDENT = 1024
"""Threads that an SM should hold, where 64 registers each are enough: with 64 bytes of each on their way, or
twice that with a residual, loads of some blocks are in flight while others compute."""

# include/jax_deepgemm/norm/norm.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/norm/norm.cuh>

struct Config {{
  using In = {dtype};
  using Vector = {vectors};
  using Fp8 = jdg::PortableE4m3;
  static constexpr int LANES = {lanes}, ROWS = {rows}, CHUNKS = {chunks};
  static constexpr float EPS = {eps}, MIN_AMAX = 0.0f;
  static constexpr bool LAYER = {layer}, RESIDUAL = {residual}, BIAS = {bias}, GAMMA = {gamma};
  static constexpr bool BETA = {beta}, NORMED = {normed}, QUANTIZED = {quantized}, UE8M0 = {ue8m0};
  static constexpr bool SUMMED = {summed}, ALIGNED = {aligned};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks}) {name}(
    {parameters}, int rows, int cols) {{
  jdg::norm<Config>({{{inputs}}}, {{{results}}}, rows, cols);
}}
"""
_TYPES = {"bfloat16": "jdg::bf16", "float16": "jdg::f16", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class Cut(NamedTuple):
    """How rows are cut: threads of a row, rows of a block, eights of a thread."""

    lanes: int
    rows: int
    chunks: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.lanes * self.rows


def cut_of(cols: int) -> Cut:
    """Whole tiles of 128 for each half warp, up to four, and as few warps as that takes.

    >>> [cut_of(cols).lanes for cols in (128, 1024, 4096, 7168, 16384)]
    [32, 32, 128, 224, 512]
    """
    chunks = 1
    while chunks < MOST_CHUNKS and WARP * WIDE * chunks < cols:
        chunks *= 2
    lanes = -(-cols // (WARP * WIDE * chunks)) * WARP
    return Cut(lanes, SHORT_THREADS // WARP if lanes == WARP else 1, chunks)


def resident(p: NormProblem) -> int:
    """Threads that an SM holds at least: fewer where each needs more registers."""
    wide, loose, busy = p.dtype == "float32", p.cols % WIDE > 0, p.form.bias or p.form.beta
    return RESIDENT // 4 if wide and loose else RESIDENT // 2 if wide or loose else RESIDENT * (4 - busy) // 4


def _pointers(p: NormProblem) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> type of operands and of results, in the op's order."""
    form, row, vector = p.form, _TYPES[p.dtype], f"const {_TYPES[p.vectors]}*"
    read = {"x": f"const {row}*"} | ({"residual": f"const {row}*"} if form.residual else {})
    read |= {name: vector for name in ("bias", "gamma", "beta") if getattr(form, name)}
    written = {"normed": f"{row}*"} if form.normed else {}
    written |= {"values": "jdg::u8*", "scales": "float*"} if form.scales else {}
    return read, written | ({"sum": f"{row}*"} if form.summed else {})


def kernel_source(p: NormProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all numbers of rows, and of columns cut alike."""
    cut, form, aligned = cut_of(p.cols), p.form, p.cols % WIDE == 0
    read, written = _pointers(p)
    name = f"jdg_norm_{_SHORT[p.dtype]}_{form}" + f"_vectors_{_SHORT[p.vectors]}" * (p.vectors != p.dtype)
    name += f"_{cut.lanes}x{cut.chunks}" + "_unaligned" * (not aligned)
    flags = {name: getattr(form, name) for name in ("residual", "bias", "gamma", "beta", "normed", "summed")}
    flags |= {"layer": form.kind == "layer", "aligned": aligned}
    flags |= {"quantized": bool(form.scales), "ue8m0": form.scales == "ue8m0"}

    def given(pointers: dict[str, str], *names: str) -> str:
        return ", ".join(one if one in pointers else "nullptr" for one in names)

    text = _TEXT.format(
        name=name,
        dtype=_TYPES[p.dtype],
        vectors=_TYPES[p.vectors],
        lanes=cut.lanes,
        rows=cut.rows,
        chunks=cut.chunks,
        threads=cut.threads,
        blocks=max(resident(p) // cut.threads, 1),
        eps=f"{np.float32(p.eps).item().hex()}f",
        parameters=", ".join(f"{kind} {one}" for one, kind in {**read, **written}.items()),
        inputs=given(read, "x", "residual", "bias", "gamma", "beta"),
        results=given(written, "normed", "values", "scales", "sum"),
        **{name: str(on).lower() for name, on in flags.items()},
    )
    return KernelSource(name, text, (("problem", str(p)),))


def _plan(p: NormProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    cut = cut_of(p.cols)
    read, written = _pointers(p)
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(max(-(-p.rows // cut.rows), 1), 1, 1),
        block=cut.threads,
        params=(
            *map(Operand, range(len(read))),
            *map(Result, range(len(written))),
            *(Scalar(size, "int32") for size in (p.rows, p.cols)),
        ),
    )
    return LaunchPlan((launch,), label=str(p))


def _refusal(p: NormProblem) -> str:
    return f"rows have {p.cols} numbers, at most {MOST_FEATURES}" if p.cols > MOST_FEATURES else ""


KERNELS = Kernels[NormProblem, None](
    sources=lambda p, config: [kernel_source(p)], plan=_plan, refusal=_refusal
)
