"""The translation unit of a grouped kernel: the persistent GEMM with another way from a tile's number to its
place (include/jax_deepgemm/grouped/gemm_grouped.cuh)."""

from __future__ import annotations

from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, shared_memory, tma_store
from jax_deepgemm.ops.gemm.sm90.source import (
    as_cpp,
    config_text,
    described,
    finish_argument,
    finish_include,
    finish_text,
    kernel_name,
    leading_parameters,
    out_type,
    product,
    reads_c,
    sides,
    written,
)
from jax_deepgemm.ops.grouped.problem import INNER, MASKED_INNER, MASKED_ROWS, ROWS, SHORT, GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import halves

_ENUM = {ROWS: "kRows", MASKED_ROWS: "kMaskedRows", INNER: "kInner", MASKED_INNER: "kMaskedInner"}
_TEXT = """\
#include <jax_deepgemm/grouped/{header}.cuh>
{include}
{mma}
{config}{finish}
struct GroupedConfig : Config {{
  static constexpr jdg::Grouping GROUPING = jdg::Grouping::{grouping};
  static constexpr bool SEGMENTED = {segmented}, ZERO_ROWS = {zero_rows}, CHAINED = {chained};
  static constexpr bool BIASED = {biased};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({parameters}) {{
  const jdg::Operands operands = {{{operands}}};
  const jdg::Groups groups = {{sizes, {offset}, total, here, weights, extent}};
  const jdg::Extents extents = {{m, n, 1, 0, stripe}};
  jdg::{header}<GroupedConfig>(operands, groups, extents, {result});
}}
"""

INTEGERS = (
    "m",
    "n",
    "k_blocks",
    "stripe",
    "total",
    "here",
    "weights",
    "extent",
)


INDEXED_INTEGERS = ("rows", "row_bytes", "row_blocks")
_INDEXED = "{{source, {scales}, index, rows, row_bytes, row_blocks}}"


def integers(p: GroupedProblem) -> tuple[str, ...]:
    """The kernel's last parameters."""
    return (*INTEGERS, *(INDEXED_INTEGERS if p.by_index else ()))


def map_names(p: GroupedProblem) -> list[str]:
    """Tensor maps of a kernel, in the order of its parameters."""
    both = sides(p.gemm)
    scaled = [f"{side.name}_scale_map" for side in both if side.has_scale_map]
    return [*(f"{side.name}_map" for side in both), *scaled, "d_map"]


def unmapped(p: GroupedProblem) -> tuple[str, ...]:
    """Parameters that a kernel has not, because an index names rows: tensor maps of that operand."""
    return (f"{p.by_index}_map", f"{p.by_index}_scale_map") if p.by_index else ()


def _indexed_parameters(p: GroupedProblem) -> list[str]:
    if not p.by_index:
        return []
    scales = ["const float* source_scales"] if p.gemm.is_fp8 else []
    return ["const char* source", *scales, "const int* index"]


def has_offset(p: GroupedProblem) -> bool:
    return p.grouping in (ROWS, INNER) and not p.chained


def _swiglu_result(p: GroupedProblem) -> str:
    pitch = "(n / 256 + 3) / 4 * 4" if p.chained else "n / 256"
    bias = "bias" if p.biased else "nullptr"
    return f"{{values, act_scales, row_weights, {bias}, n / 2, {pitch}}}"


def grouped_name(p: GroupedProblem, c: Sm90Config) -> str:
    """The name that profilers show."""
    base = kernel_name(p.gemm, c).removeprefix("jdg_sm90_")
    parts = ["jdg_sm90", SHORT[p.grouping], base, f"g{p.capacity}"]
    parts += ["swiglu"] if p.swiglu else []
    parts += ["bias"] if p.biased else []
    parts += ["seg"] if p.segmented else []
    parts += ["zero"] if p.zero_rows else []
    parts += ["chained"] if p.chained else []
    parts += ["blocks"] if p.whole_blocks else []
    parts += [f"{p.by_index}_by_index"] if p.by_index else []
    return "_".join(parts)


def grouped_source(p: GroupedProblem, c: Sm90Config) -> KernelSource:
    """The source of the kernel that runs `c` on `p`."""
    a, b = sides(p.gemm)
    maps = {"a_map": "&a_map", "b_map": "&b_map", "a_scale_map": a.scale_map, "b_scale_map": b.scale_map}
    maps |= dict.fromkeys(unmapped(p), "nullptr")
    masked = p.grouping in (MASKED_ROWS, MASKED_INNER)
    batched_a, batched_b = int(masked), int(masked or p.grouping == ROWS)
    operands = [*maps.values(), "k_blocks"]
    operands += [str(flag) for flag in (batched_a, batched_b, batched_a, batched_b)]
    if p.by_index:
        operands += ["0", _INDEXED.format(scales="source_scales" if p.gemm.is_fp8 else "nullptr")]
    bias = ["const float* bias"] if p.biased else []
    leading = [one for one in leading_parameters(p.gemm, c) if one.split()[-1] not in unmapped(p)]
    parameters = [*leading, *bias, *_indexed_parameters(p), "const int* sizes"]
    d_map = "&d_map" if tma_store(p.gemm, c) else "nullptr"
    addend = "c" if reads_c(p.gemm) else f"static_cast<const {out_type(p.gemm)}*>(nullptr)"
    finished = finish_argument(p.gemm, ["0", "1"])  # a bias of each group
    parameters += ["const int* offset"] if has_offset(p) else []
    name = grouped_name(p, c)
    text = _TEXT.format(
        header="gemm_grouped_swiglu" if p.swiglu else "gemm_grouped",
        include=finish_include(p.gemm),
        finish=finish_text(p.gemm),
        mma=product(p.gemm, c, a, b),
        config=config_text(
            p.gemm,
            c,
            a,
            b,
            mask_k=p.inner and not p.whole_blocks,
            whole_blocks=p.whole_blocks,
            halves=halves(p, c),
            by_index=p.by_index,
        ),
        grouping=_ENUM[p.grouping],
        segmented=as_cpp(p.segmented),
        zero_rows=as_cpp(p.zero_rows),
        chained=as_cpp(p.chained),
        biased=as_cpp(p.biased),
        threads=c.threads,
        name=name,
        parameters=", ".join([*parameters, *(f"int {x}" for x in integers(p))]),
        operands=", ".join(operands),
        offset="offset" if has_offset(p) else "nullptr",
        result=_swiglu_result(p) if p.swiglu else f"{d_map}, {written(p.gemm)}, {addend}{finished}",
    )
    return KernelSource(name, text, described(p, c), shared_memory=shared_memory(p.gemm, c).total)
