"""The translation unit of one kernel: the wgmma of its width, its configuration, its entry point."""

from __future__ import annotations

from jax_deepgemm.jit import KernelSource
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem, shared_memory, tma_store
from jax_deepgemm.sm90.wgmma import wgmma_wrapper

_TEXT = """\
#include <jax_deepgemm/{header}.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  static constexpr int ROWS = {rows}, COLS = {cols}, BLOCK_K = {block_k}, STAGES = {stages};
  static constexpr int WARPGROUPS = {warpgroups}, SPLITS = {splits}, SCALE_SLOTS = (STAGES + 3) / 4 + 1;
  static constexpr int SLABS = {slabs}, STAGING_BYTES = {staging}, SHARED_BYTES = {shared};
  static constexpr int REGISTERS = {registers}, PRODUCER_REGISTERS = {producer_registers};
  static constexpr bool ROWS_K_MAJOR = {rows_k_major}, COLS_K_MAJOR = {cols_k_major};
  static constexpr bool ADD = {add}, TMA_STORE = {tma_store}, EVEN_N = {even_n};
  static constexpr jdg::Scale ROW_SCALES = jdg::Scale::{row_scales}, COL_SCALES = jdg::Scale::{col_scales};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks_per_sm}) {name}({parameters}) {{
  const jdg::Operands operands = {{{operands}}};
  const jdg::Problem problem = {{m, n, batches, batched_c, stripe}};
  jdg::{header}<Config>(operands, problem, {d_map}, d, {c});
}}
"""

_SCALES = {"vector": "kVector", "block": "kBlock", "none": "kNone"}


def kernel_name(p: GemmProblem, c: GemmConfig) -> str:
    """The name that profilers show: operand types, layout, tile, stages; shapes are run-time parameters."""
    types = p.a if p.a == p.b else f"{p.a}_{p.b}"
    parts = ["jdg_sm90", types, p.layout, f"{c.block_m}x{c.block_n}", f"s{c.stages}"]
    parts += [f"d{c.slabs}"] if c.slabs else []
    parts += ["swap", f"k{c.split_k}"] if c.swap_ab else []
    parts += [f"x{c.blocks_per_sm}"] if c.blocks_per_sm > 1 else []
    parts += ["sb1"] if p.b_scales == "vector" else []
    parts += ["f32"] if p.out == "float32" else []
    parts += ["add"] if p.add_c else []
    if not c.swap_ab:
        parts += ["odd"] if p.n % 2 else ["unaligned"] if p.out == "bfloat16" and not tma_store(p, c) else []
    return "_".join(parts)


def kernel_source(p: GemmProblem, c: GemmConfig) -> KernelSource:
    """The source of the kernel that runs `c` on `p`; equal for all shapes whose D is aligned alike."""
    memory = shared_memory(p, c)
    sides = [("a", p.a, p.a_k_major, "vector" if p.is_fp8 else "none"), ("b", p.b, p.b_k_major, p.b_scales)]
    rows, cols = reversed(sides) if c.swap_ab else sides
    maps = [f"const __grid_constant__ jdg::TensorMap {name}_map" for name in ("a", "b")]
    maps += [f"const __grid_constant__ jdg::TensorMap {s[0]}_scale_map" for s in sides if s[3] == "vector"]
    maps += ["const __grid_constant__ jdg::TensorMap d_map"] if tma_store(p, c) else []
    out = "float" if p.out == "float32" else "jdg::bf16"
    parameters = [*maps, *(["const float* block_scales"] if p.b_scales == "block" else []), f"{out}* d"]
    parameters += [f"const {out}* c"] if p.add_c else []
    parameters += [f"int {x}" for x in INTEGERS]
    scale_maps = [f"&{s[0]}_scale_map" if s[3] == "vector" else "nullptr" for s in (rows, cols)]
    block_scales = "block_scales" if p.b_scales == "block" else "nullptr"
    operands = [f"&{rows[0]}_map", f"&{cols[0]}_map", *scale_maps, block_scales]
    operands += ["k_blocks", "block_scale_rows", "block_scale_pitch"]
    operands += [f"batched_{side[0]}{of}" for of in ("", "_scales") for side in (rows, cols)]
    name = kernel_name(p, c)
    text = _TEXT.format(
        header="gemm_small_m" if c.swap_ab else "gemm",
        mma=wgmma_wrapper(c.cols, rows[1], cols[1], a_k_major=rows[2], b_k_major=cols[2]),
        out=out,
        rows=c.rows,
        cols=c.cols,
        block_k=p.block_k,
        stages=c.stages,
        warpgroups=c.warpgroups,
        splits=c.split_k,
        slabs=c.slabs,
        staging=memory.staging,
        shared=memory.total,
        registers=c.registers,
        producer_registers=c.producer_registers,
        tma_store=str(tma_store(p, c)).lower(),
        even_n=str(p.n % 2 == 0).lower(),
        d_map="&d_map" if tma_store(p, c) else "nullptr",
        rows_k_major=str(rows[2]).lower(),
        cols_k_major=str(cols[2]).lower(),
        add=str(p.add_c).lower(),
        row_scales=_SCALES[rows[3]],
        col_scales=_SCALES[cols[3]],
        threads=c.threads,
        blocks_per_sm=c.blocks_per_sm,
        name=name,
        parameters=", ".join(parameters),
        operands=", ".join(operands),
        c="c" if p.add_c else "nullptr",
    )
    shown = ("block_m", "block_n", "stages", "swap_ab", "split_k", "blocks_per_sm", "slabs")
    described = (("problem", str(p)), *((field, getattr(c, field)) for field in shown))
    return KernelSource(name, text, described, shared_memory=memory.total)


INTEGERS = (
    "m",
    "n",
    "batches",
    "k_blocks",
    "block_scale_rows",
    "block_scale_pitch",
    "stripe",
    "batched_a",
    "batched_b",
    "batched_a_scales",
    "batched_b_scales",
    "batched_c",
)
