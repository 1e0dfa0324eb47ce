"""The translation unit of a mixed-input kernel (include/jax_deepgemm/mixed/mixed.cuh)."""

from __future__ import annotations

from jax_deepgemm.jit import KernelSource
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS, SHORT
from jax_deepgemm.ops.mixed.problem import E4M3, FP4, FP4_BF16, INT8, NVFP4, MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import (
    PRODUCER_REGISTERS,
    SCALE_STAGES,
    SLAB_STAGES,
    STAGED_REGISTERS,
    STAGING_BYTES,
    STAGING_SLABS,
    MixedConfig,
    height,
    shared_memory,
)

_ONCE_TOKENS = 64  # of a weight that one SM reads
_TEXT = """\
#include <jax_deepgemm/mixed/mixed.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  using Scale = {scale};
  static constexpr jdg::Weights WEIGHTS = jdg::Weights::{weights_in};
  static constexpr int ROWS = {tokens}, COLS = {height}, DEEP = {deep}, SPLITS = {splits};
  static constexpr int STAGES = {stages}, TABLE_BYTES = {table}, SHARED_BYTES = {shared};
  static constexpr bool DENSE = {dense}, ONCE = {once}, HALVES = false;
  static constexpr bool BATCHES_TOGETHER = false;
  static constexpr jdg::Grouping GROUPING = jdg::Grouping::{grouping};
  static constexpr bool SEGMENTED = {segmented}, ZERO_ROWS = {zero_rows}, CHAINED = false;
  static constexpr bool WHOLE_BLOCKS = false;
  static constexpr int REGISTERS = {registers}, PRODUCER_REGISTERS = {producer_registers};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks_per_sm}) {name}({parameters}) {{
  const jdg::MixedOperands<Config> operands = {{&a_map, {boxes}, {slabs}, {scales}, k_blocks}};
  const jdg::Groups groups = {{{sizes}, {offset}, total, here, weights, m}};
  jdg::mixed<Config>(operands, groups, {{m, n, 1, 0, stripe}}, d);
}}
"""
_STAGED = """\
#include <jax_deepgemm/mixed/staged.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  using Scale = float;
  static constexpr jdg::Weights WEIGHTS = jdg::Weights::kFp4;
  static constexpr int ROWS = {tokens}, COLS = {height}, BLOCK_K = 128, PASSES = 1, DEEP = 1, SPLITS = 1;
  static constexpr int STAGES = {stages}, SLAB_STAGES = {slab_stages}, SCALE_STAGES = {scale_stages};
  static constexpr int WARPGROUPS = 2, ACROSS = 1;
  static constexpr int SLABS = {slabs}, STAGING_BYTES = {staging};
  static constexpr int TABLE_BYTES = {table}, SHARED_BYTES = {shared}, SCALE_SLOTS = 0;
  static constexpr int REGISTERS = {registers}, PRODUCER_REGISTERS = {producer_registers};
  static constexpr int EXPANDER_REGISTERS = {expander_registers};
  static constexpr jdg::Scale ROW_SCALES = jdg::Scale::kNone, COL_SCALES = jdg::Scale::kNone;
  static constexpr bool ROWS_K_MAJOR = true, COLS_K_MAJOR = true, SWAP_AB = false, GATED = false;
  static constexpr bool MASK_K = false, RUNS = false, WHOLE_BLOCKS = false, HALVES = false;
  static constexpr bool PING_PONG = false, ROWS_ONCE = false, COLS_ONCE = false, ONCE = false;
  static constexpr bool ADD = false, REDUCE = false, TMA_STORE = true, EVEN_N = true;
  static constexpr bool BATCH_INSIDE = false, BATCHES_TOGETHER = false;
  static constexpr bool ROWS_BY_INDEX = false, COLS_BY_INDEX = false;
  static constexpr bool DENSE = {dense}, SEGMENTED = {segmented}, ZERO_ROWS = {zero_rows}, CHAINED = false;
  static constexpr jdg::Grouping GROUPING = jdg::Grouping::{grouping};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({parameters}) {{
  const jdg::MixedOperands<Config> operands = {{&a_map, nullptr, slabs, scales, k_blocks}};
  const jdg::Groups groups = {{{sizes}, {offset}, total, here, weights, m}};
  jdg::staged<Config>(operands, groups, {{m, n, 1, 0, stripe}}, &d_map, d);
}}
"""
INTEGERS = ("m", "n", "k_blocks", "stripe", "total", "here", "weights")
_FIELDS = ("tokens", "across", "deep", "stages", "split_k", "blocks_per_sm", "staged")
_FORMATS = {FP4: "kFp4", FP4_BF16: "kFp4Bf16", NVFP4: "kNvfp4", INT8: "kInt8", E4M3: "kE4m3"}
_TYPES = {"float32": "float", "bfloat16": "jdg::bf16"}
_ENUM = {"dense": "kRows", ROWS: "kRows", MASKED_ROWS: "kMaskedRows"}


def _cpp(value: bool) -> str:
    return str(value).lower()


def described(p: MixedProblem) -> tuple[str, ...]:
    """Operands that say which rows are whose."""
    return {ROWS: ("group_sizes", "group_offset"), MASKED_ROWS: ("group_sizes",)}.get(p.grouping, ())


def _once(p: MixedProblem) -> bool:
    return p.tokens <= _ONCE_TOKENS


def _name(p: MixedProblem, c: MixedConfig) -> str:
    kind = "mixed" if p.dense else f"{SHORT[p.grouping]}_mixed"
    types = f"{'e4m3' if p.scaled_tokens else 'bf16'}_{p.weights_in.removesuffix('_bf16')}"
    parts = ["jdg", kind, types, f"{c.tokens}x{height(p, c)}", f"d{c.deep}", f"s{c.stages}"]
    parts += [f"k{c.split_k}"] if c.split_k > 1 else []
    parts += [f"x{c.blocks_per_sm}"] if c.blocks_per_sm > 1 else []
    parts += ["staged"] if c.staged else []
    parts += ["f32"] if p.out == "float32" else []
    parts += ["sbf16"] if not p.in_slabs and p.scales == "bfloat16" else []
    parts += ["once"] if _once(p) and not c.staged else []
    parts += [] if p.dense else [f"g{p.capacity}"]
    parts += ["seg"] if p.segmented else []
    parts += ["zero"] if p.zero_rows else []
    return "_".join(parts)


def _ends(p: MixedProblem, parameters: list[str]) -> dict[str, str]:
    """All parameters of a kernel, of which those that are given come first, and which of them say what groups
    there are."""
    parts = described(p)
    every = [*parameters, *(f"const int* {part}" for part in parts), *(f"int {x}" for x in INTEGERS)]
    sizes, offset, *_ = (*parts, "nullptr", "nullptr")
    return {"parameters": ", ".join(every), "sizes": sizes, "offset": offset}


def _kernel(p: MixedProblem, c: MixedConfig, text: str) -> KernelSource:
    shown = (("problem", str(p)), *((field, getattr(c, field)) for field in _FIELDS))
    return KernelSource(_name(p, c), text, shown, shared_memory=shared_memory(p, c))


def mixed_source(p: MixedProblem, c: MixedConfig) -> KernelSource:
    if c.staged:
        return _staged_source(p, c)
    out, scale = _TYPES[p.out], "float" if p.in_slabs else _TYPES[p.scales]
    maps = ["a_map"] if p.in_slabs else ["a_map", "w_map"]
    parameters = [f"const __grid_constant__ jdg::TensorMap {one}" for one in maps]
    scaled = p.scaled_tokens or not p.in_slabs
    parameters += [f"const {scale}* scales"] if scaled else []
    parameters += ["const jdg::u8* slabs"] if p.in_slabs else []
    parameters += [f"{out}* d"]
    element = "e4m3" if p.scaled_tokens else "bf16"
    text = _TEXT.format(
        mma=wgmma_wrapper(c.tokens, element, element, a_in_registers=True),
        out=out,
        scale=scale,
        weights_in=_FORMATS[p.weights_in],
        boxes="nullptr" if p.in_slabs else "&w_map",
        slabs="slabs" if p.in_slabs else "nullptr",
        scales="scales" if scaled else "nullptr",
        tokens=c.tokens,
        height=height(p, c),
        deep=c.deep,
        splits=c.split_k,
        stages=c.stages,
        table=p.table_bytes,
        shared=shared_memory(p, c),
        dense=_cpp(p.dense),
        once=_cpp(_once(p)),
        grouping=_ENUM[p.grouping],
        segmented=_cpp(p.segmented),
        zero_rows=_cpp(p.zero_rows),
        registers=c.registers,
        producer_registers=PRODUCER_REGISTERS if c.shares_registers else 0,
        threads=c.threads,
        blocks_per_sm=c.blocks_per_sm,
        name=_name(p, c),
        **_ends(p, parameters),
    )
    return _kernel(p, c, text)


def _staged_source(p: MixedProblem, c: MixedConfig) -> KernelSource:
    parameters = [f"const __grid_constant__ jdg::TensorMap {one}" for one in ("a_map", "d_map")]
    parameters += ["const float* scales", "const jdg::u8* slabs", f"{_TYPES[p.out]}* d"]
    text = _STAGED.format(
        mma=wgmma_wrapper(height(p, c), "e4m3", "e4m3"),
        out=_TYPES[p.out],
        tokens=c.tokens,
        height=height(p, c),
        stages=c.stages,
        slab_stages=SLAB_STAGES,
        scale_stages=SCALE_STAGES,
        slabs=STAGING_SLABS,
        staging=STAGING_BYTES,
        table=p.table_bytes,
        shared=shared_memory(p, c),
        registers=c.registers,
        producer_registers=STAGED_REGISTERS.producer,
        expander_registers=STAGED_REGISTERS.expander,
        dense=_cpp(p.dense),
        segmented=_cpp(p.segmented),
        zero_rows=_cpp(p.zero_rows),
        grouping=_ENUM[p.grouping],
        threads=c.threads,
        name=_name(p, c),
        **_ends(p, parameters),
    )
    return _kernel(p, c, text)
