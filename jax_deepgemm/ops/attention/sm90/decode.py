"""Attention of few rows: problem and configuration -> source texts and launches;
include/jax_deepgemm/attention/decode.cuh says how."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.launch import Launch, Operand, Result, Scalar, Scratch
from jax_deepgemm.core.parameters import Param
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.attention.family import AttentionConfig
from jax_deepgemm.ops.attention.problem import ROWS, AttentionProblem

MERGE_WARPS, FEW_ROWS = (8, 2), 512
"""Warps of a block that adds up the pieces of a row: where rows are so few, which then have many, or more."""
MERGE_BLOCKS = 32
"""Of an SM: blocks have further tokens where there would be more."""
_ALL = 2**31 - 1

# include/jax_deepgemm/attention/decode.cuh says what each field means.
_CONFIG = """\
struct Config {{
  using T = jdg::{q_dtype};
  static constexpr bool F16 = {is_f16}, FP8 = {is_fp8};
  static constexpr int D = {depth}, DV = {v_depth}, GROUP = {group}, PAGE = {page};
  static constexpr int ROWS = {rows}, KEYS = {keys}, WARPS = {warps}, STAGES = {stages};
  static constexpr bool CAUSAL = {causal}, WINDOW = {window}, SOFTCAP = {softcap};
  static constexpr bool SINKS = {sinks}, SLOPES = {slopes};
  static constexpr int SHARED_BYTES = {shared};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks}) {name}(
    const jdg::{q_dtype}* q, const char* k, const char* v, const float* k_scale, const float* v_scale,
    const int* tables, const int* starts, const int* lengths, const int* layer, const float* sinks,
    const float* slopes, jdg::{q_dtype}* out, float* lse, float* parts, float* part_stats, int tokens,
    int sequences, int table_pages, int pages, int layers, int kv_heads, int most_rows, float scale,
    float softcap, int window, int split, int most_own_rows, int most_weights, int shares) {{
  const jdg::AttentionCall<jdg::{q_dtype}> call = {{
      q, k, v, k_scale, v_scale, tables, starts, lengths, layer, sinks, slopes, out, lse, tokens, sequences,
      table_pages, pages, layers, kv_heads, most_rows, scale, softcap, window}};
"""
_DECODE = """\
#include <jax_deepgemm/attention/decode.cuh>

{config}  jdg::attention_decode<Config>(call, {{split, most_own_rows, most_weights}}, parts, part_stats);
}}
"""
_MERGE = """\
#include <jax_deepgemm/attention/merge.cuh>

{config}  jdg::attention_merge<Config, {warps}>(
      call, {{split, most_own_rows, most_weights}}, parts, part_stats, shares);
}}
"""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_pitch(p: AttentionProblem, depth: int) -> int:
    """Bytes between rows of a tile in shared memory; mirrors TileShape."""
    size = depth * (1 if p.kv_dtype == "e4m3" else 2)
    return 64 if size <= 64 else ceil_div(size, 128) * 128


def tile_bytes(p: AttentionProblem, c: AttentionConfig) -> int:
    """Of a tile of keys and that of their values."""
    return c.keys * (row_pitch(p, p.depth) + row_pitch(p, p.v_depth))


def layout_bytes(p: AttentionProblem, c: AttentionConfig) -> int:
    """Of shared memory but the prefix sums; mirrors DecodeLayout."""
    sums = c.warps * ROWS * (p.v_depth + 6) * 4
    return max(c.warps * c.stages * tile_bytes(p, c), sums)


def shared_memory(p: AttentionProblem, c: AttentionConfig) -> int:
    """Bytes of dynamic shared memory of a block."""
    return layout_bytes(p, c) + 4 * (c.warps + p.seqs + 1)


def merge_warps(p: AttentionProblem) -> int:
    """Of a block that adds up pieces; with parts of a fixed size the same in all batches, as bits are."""
    return MERGE_WARPS[not p.split and p.tokens * p.heads > FEW_ROWS]


def merge_memory(p: AttentionProblem) -> int:
    """Bytes of dynamic shared memory of a block that adds up pieces."""
    return 4 * (merge_warps(p) * (p.v_depth + 3) + p.seqs + 1)


def round_keys(c: AttentionConfig) -> int:
    """Keys that a block has at a time."""
    return c.keys * c.warps


def parts_of(p: AttentionProblem, c: AttentionConfig) -> int:
    """Rounds of one part of a sequence, or 0 where blocks' shares decide."""
    return max(1, ceil_div(p.split, round_keys(c))) if p.split else 0


def most_units(p: AttentionProblem) -> int:
    """Of all sequences, whatever their lengths."""
    return (p.tokens * p.group // ROWS + min(p.seqs, p.tokens)) * p.kv_heads


def most_weights(p: AttentionProblem, c: AttentionConfig) -> int:
    """What is dealt out, at most."""
    rounds = ceil_div(p.keys, round_keys(c)) + 1
    return most_units(p) * (ceil_div(rounds, parts_of(p, c)) if p.split else rounds)


def cutting(p: AttentionProblem, c: AttentionConfig, most_own_rows: int = _ALL) -> tuple[int, int, int]:
    """What kernels are told of how work is cut, for sequences of so many tokens at most."""
    return parts_of(p, c), most_own_rows, most_weights(p, c)


def slots(p: AttentionProblem, c: AttentionConfig, chip: Chip) -> int:
    """Sums of pieces of units, [ROWS, v_depth] each."""
    return most_weights(p, c) if p.split else 2 * chip.num_sms * c.blocks


def _text(p: AttentionProblem, c: AttentionConfig, name: str, threads: int, blocks: int) -> str:
    flags = {
        "is_f16": p.q_dtype == "f16",
        "is_fp8": p.kv_dtype == "e4m3",
        "causal": p.causal,
        "window": p.window > 0,
        "softcap": p.softcap > 0,
        "sinks": p.with_sinks,
        "slopes": p.with_slopes,
    }
    return _CONFIG.format(
        name=name,
        q_dtype=p.q_dtype,
        depth=p.depth,
        v_depth=p.v_depth,
        group=p.group,
        page=p.page,
        rows=ROWS,
        keys=c.keys,
        warps=c.warps,
        stages=c.stages,
        shared=layout_bytes(p, c),
        threads=threads,
        blocks=blocks,
        **{flag: str(on).lower() for flag, on in flags.items()},
    )


def _name(p: AttentionProblem, c: AttentionConfig, kind: str) -> str:
    parts = [f"jdg_attention_{kind}", p.q_dtype, *["fp8"] * (p.kv_dtype == "e4m3"), f"d{p.depth}"]
    parts += [f"v{p.v_depth}"] * (p.v_depth != p.depth) + [f"g{p.group}", f"p{p.page}"]
    parts += [f"{c.warps}x{c.keys}", f"s{c.stages}", f"b{c.blocks}"]
    flags = {"full": not p.causal, "window": p.window > 0, "softcap": p.softcap > 0}
    flags |= {"sinks": p.with_sinks, "slopes": p.with_slopes}
    return "_".join([*parts, *(flag for flag, on in flags.items() if on)])


def decode_source(p: AttentionProblem, c: AttentionConfig) -> KernelSource:
    """The source of the kernel that reads keys, equal for all batches and pools."""
    name = _name(p, c, "decode")
    text = _DECODE.format(config=_text(p, c, name, 32 * c.warps, c.blocks))
    return KernelSource(
        name, text, (("problem", str(p)), ("config", str(c))), shared_memory=shared_memory(p, c)
    )


def merge_source(p: AttentionProblem, c: AttentionConfig) -> KernelSource:
    """The source of the kernel that adds up pieces."""
    warps = merge_warps(p)
    name = _name(p, c, f"merge{warps}")
    text = _MERGE.format(config=_text(p, c, name, 32 * warps, 1), warps=warps)
    return KernelSource(name, text, (("problem", str(p)), ("config", str(c))), merge_memory(p))


def scratch_bytes(p: AttentionProblem, c: AttentionConfig, chip: Chip) -> tuple[int, int]:
    """Of the sums of pieces, and of their rows' largest scores and denominators."""
    rows = slots(p, c, chip) * ROWS
    return rows * p.v_depth * 4, rows * 8


def launches(
    p: AttentionProblem, c: AttentionConfig, chip: Chip, most_own_rows: int = _ALL
) -> tuple[Launch, ...]:
    """The kernel that reads keys, for sequences of so many tokens at most, and the one that adds up."""
    shares = chip.num_sms * c.blocks
    sizes = (p.tokens, p.seqs, p.table_pages, p.pages, p.layers, p.kv_heads, p.max_q_len or _ALL)
    params: tuple[Param, ...] = (
        *map(Operand, range(11)),
        *(Result(0), Result(1), Scratch(0), Scratch(1)),
        *(Scalar(size, "int32") for size in sizes),
        Scalar(p.scale, "float32"),
        Scalar(p.softcap, "float32"),
        *(Scalar(size, "int32") for size in (p.window, *cutting(p, c, most_own_rows), shares)),
    )
    reading, adding = decode_source(p, c), merge_source(p, c)
    return (
        Launch(
            kernel=compile_kernel(reading, arch=chip.arch),
            grid=(shares, 1, 1),
            block=32 * c.warps,
            params=params,
            shared_memory=reading.shared_memory,
        ),
        Launch(
            kernel=compile_kernel(adding, arch=chip.arch),
            grid=(min(p.tokens, max(1, MERGE_BLOCKS * chip.num_sms // p.heads)), p.heads, 1),
            block=32 * merge_warps(p),
            params=params,
            shared_memory=adding.shared_memory,
            pdl=True,
        ),
    )
