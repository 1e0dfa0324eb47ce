"""Attention of many queries on Hopper: problem and configuration -> source text and Launch;
include/jax_deepgemm/attention/prefill.cuh says how."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Operands
from jax_deepgemm.core.launch import Launch, Memset, Operand, Result, Scalar, Scratch, TensorMap
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.attention.problem import AttentionProblem

TICKET_BYTES = 4
_SLAB, _SLAB_BYTES = 64, 128
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "e4m3": "uint8"}
_STAGES = {False: ((4, 0), (3, 0), (2, 0)), True: ((3, 4), (2, 4), (2, 3), (2, 2))}
"""Slots of keys and of values, and of either in e4m3, the most first."""

# PrefillConfig of include/jax_deepgemm/attention/prefill_config.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/attention/prefill.cuh>

namespace scores {{{scores}}}
namespace values {{{values}}}
namespace rest {{{rest}}}
struct Config {{
  using Scores = scores::Mma;
  using Values = values::Mma;
  using Rest = rest::Mma;
  using T = jdg::{q_dtype};
  static constexpr int KEYS = {keys}, DEPTH = {depth}, V_DEPTH = {v_depth}, FIRST = {first}, PAGE = {page};
  static constexpr int KV_HEADS = {kv_heads}, GROUP = {group}, CONSUMERS = {consumers};
  static constexpr int STAGES = {stages}, PACKED_STAGES = {packed_stages};
  static constexpr bool CAUSAL = {causal}, WINDOW = {window}, SOFTCAP = {softcap}, SLOPES = {slopes};
  static constexpr bool SCALED = {scaled}, SINKS = {sinks}, PING_PONG = {ping_pong};
  static constexpr int DECODE_ROWS = {decode_rows}, SHARED_BYTES = {shared};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(
    const jdg::{q_dtype}* q, const __grid_constant__ jdg::TensorMap k,
    const __grid_constant__ jdg::TensorMap v, const float* k_scale, const float* v_scale, const int* tables,
    const int* starts, const int* lengths, const int* layer, const float* sinks, const float* slopes,
    jdg::{q_dtype}* out, float* lse, int tokens, int sequences, int table_pages, int pages, int layers,
    int kv_heads, int most_rows, float scale, float softcap, int window, int* tickets) {{
  jdg::prefill<Config>({{{{q, nullptr, nullptr, k_scale, v_scale, tables, starts, lengths, layer, sinks,
                         slopes, out, lse, tokens, sequences, table_pages, pages, layers, kv_heads, most_rows,
                         scale, softcap, window}}, &k, &v, tickets}});
}}
"""


@dataclass(frozen=True)
class PrefillConfig:
    """How a problem is cut.

    Attributes:
      keys: of a tile.
      stages: slots of keys, and of values.
      packed_stages: slots of either in e4m3, 0 for a cache of the queries' type.
      decode_rows: packed rows of a sequence (queries x group) up to which another kernel takes it.
      consumers: warpgroups, each of which has 64 packed rows of a tile.
      ping_pong: whether two of them issue their products in turn.
    """

    keys: int
    stages: int
    packed_stages: int = 0
    decode_rows: int = 0
    consumers: int = 2
    ping_pong: bool = False


def rows_of(c: PrefillConfig) -> int:
    """Packed rows of a tile."""
    return 64 * c.consumers


def threads_of(c: PrefillConfig) -> int:
    """Of a block: consumers, those that load, and those that widen a cache in e4m3."""
    return 128 * (c.consumers + 1 + (c.packed_stages > 0))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_packed(p: AttentionProblem) -> bool:
    """Whether the cache is in e4m3, which the kernel widens."""
    return p.kv_dtype == "e4m3"


def prefill_config(p: AttentionProblem, decode_rows: int = 0, smem: int = 232_448) -> PrefillConfig:
    """The one that is used: of the largest tiles, first of keys, then of rows, the one with most slots."""
    for keys in (128, 112, 96, 80, 64):
        for consumers in (3, 2):
            for stages in _STAGES[is_packed(p)]:
                c = PrefillConfig(keys, *stages, decode_rows, consumers, ping_pong=consumers == 2)
                if not problems_with(p, c) and shared_memory(p, c) <= smem:
                    return c
    raise ValueError(f"no tile for {p}")


REGISTERS = {2: 232 - 52, 3: 160 - 32}
"""Of scores, their weights and sums, by consumers, so that a thread's other numbers have room."""


def problems_with(p: AttentionProblem, c: PrefillConfig) -> list[str]:
    """The rules that a configuration breaks."""
    registers = c.keys // 2 + c.keys // 4 + p.v_depth // 2
    rules = (
        (c.keys % 16 == 0 and 16 <= c.keys <= 256, f"keys is {c.keys}, need a multiple of 16 up to 256"),
        (2 <= c.stages <= 8, f"stages is {c.stages}, need 2 to 8"),
        (
            2 <= c.packed_stages <= 8 if is_packed(p) else c.packed_stages == 0,
            f"packed_stages is {c.packed_stages}, need 2 to 8 for a cache in e4m3, 0 for another",
        ),
        (c.consumers in REGISTERS, f"consumers is {c.consumers}, need 2 or 3"),
        (
            c.consumers == 2 or not (c.ping_pong or c.packed_stages),
            "3 consumers take no turns, and leave no registers for widening a cache in e4m3",
        ),
        (
            registers <= REGISTERS.get(c.consumers, 0),
            f"{c.keys} keys by {p.v_depth} need {registers} registers, {c.consumers} consumers have "
            f"{REGISTERS.get(c.consumers, 0)}",
        ),
    )
    return [words for kept, words in rules if not kept]


def shared_memory(p: AttentionProblem, c: PrefillConfig) -> int:
    """Bytes of shared memory; mirrors PrefillLayout, which asserts it."""
    slabs, v_slabs = ceil_div(p.depth, _SLAB), ceil_div(p.v_depth, _SLAB)
    tiles = slabs * rows_of(c) + c.stages * c.keys * (slabs + v_slabs)
    packed = c.packed_stages * c.keys * max(p.depth, p.v_depth)
    pipelines = 32 * (2 * c.stages + c.packed_stages + 1 + 2)
    return tiles * _SLAB_BYTES + packed + pipelines + 2 * 32 + 4 * 128


def kernel_name(p: AttentionProblem, c: PrefillConfig) -> str:
    """The name that profilers show."""
    depth = f"d{p.depth}" if p.depth == p.v_depth else f"d{p.depth}v{p.v_depth}"
    flags = [
        *["causal"] * p.causal,
        *["window"] * (p.window > 0),
        *["softcap"] * (p.softcap > 0),
        *["slopes"] * p.with_slopes,
        *["sinks"] * p.with_sinks,
        *["scaled"] * (p.scale <= 0),
        *["turns"] * c.ping_pong,
    ]
    sizes = [depth, f"h{p.heads}x{p.kv_heads}", f"page{p.page}", f"k{c.keys}s{c.stages}r{c.decode_rows}"]
    sizes += [f"p{c.packed_stages}"] if c.packed_stages else []
    sizes += [f"w{c.consumers}"]
    types = [p.q_dtype, *["e4m3"] * is_packed(p)]
    return "_".join(["jdg_prefill", *types, *sizes, *flags])


def first_columns(p: AttentionProblem, c: PrefillConfig) -> int:
    """Columns of values that one instruction takes: threads of four warpgroups begin with 128 registers each,
    which an instruction of more than 128 columns would not fit in."""
    return min(p.v_depth, 128) if threads_of(c) > 384 else p.v_depth


def _values(p: AttentionProblem, columns: int) -> str:
    return wgmma_wrapper(columns, p.q_dtype, p.q_dtype, b_k_major=False, a_in_registers=True)


def prefill_source(p: AttentionProblem, c: PrefillConfig) -> KernelSource:
    """The source of the kernel that runs `c` on `p`, equal for any number of tokens, sequences and pages."""
    name, shared, first = kernel_name(p, c), shared_memory(p, c), first_columns(p, c)
    said = {
        "causal": p.causal,
        "window": p.window > 0,
        "softcap": p.softcap > 0,
        "slopes": p.with_slopes,
        "sinks": p.with_sinks,
        "scaled": p.scale <= 0,
        "ping_pong": c.ping_pong,
    }
    text = _TEXT.format(
        scores=wgmma_wrapper(c.keys, p.q_dtype, p.q_dtype),
        values=_values(p, first),
        rest=_values(p, p.v_depth - first or first),
        first=first,
        q_dtype=p.q_dtype,
        keys=c.keys,
        consumers=c.consumers,
        depth=p.depth,
        v_depth=p.v_depth,
        page=p.page,
        kv_heads=p.kv_heads,
        group=p.group,
        stages=c.stages,
        packed_stages=c.packed_stages,
        decode_rows=c.decode_rows,
        shared=shared,
        threads=threads_of(c),
        name=name,
        **{flag: str(value).lower() for flag, value in said.items()},
    )
    return KernelSource(name, text, (("problem", str(p)), ("config", str(c))), shared_memory=shared)


def tensor_maps(p: AttentionProblem, c: PrefillConfig, given: Operands) -> list[TensorMap]:
    """Of keys and values; what lies outside arrives as zeros. A box has keys of a page and head: where rows
    are some times 64 numbers, all of these, in groups of eight keys as they are multiplied; else 64 of them,
    or in e4m3 the whole row, which is widened."""
    rows, packed = math.gcd(p.page, c.keys), is_packed(p)
    maps = []
    for part, depth in (("k", p.depth), ("v", p.v_depth)):
        row = depth if packed else 2 * depth
        joined = depth % _SLAB == 0 and not packed
        dims: tuple[int, ...]
        if joined:
            slabs = depth // _SLAB
            dims = (_SLAB, 8, slabs, p.page // 8, p.layers * p.pages * p.kv_heads)
            strides: tuple[int, ...] = (row, _SLAB_BYTES, 8 * row, p.page * row)
            box: tuple[int, ...] = (_SLAB, 8, slabs, rows // 8, 1)
        else:
            dims = (depth, p.page, p.kv_heads, p.layers * p.pages)
            strides = (row, p.page * row, p.kv_heads * p.page * row)
            box = (depth if packed else _SLAB, rows, 1, 1)
        buffer = Operand(given[part].index)
        maps.append(TensorMap(buffer, _DTYPES[p.kv_dtype], dims, strides, box, 0 if packed else 128))
    return maps


def integers(p: AttentionProblem) -> tuple[int, ...]:
    """The kernel's parameters from `tokens` on."""
    return p.tokens, p.seqs, p.table_pages, p.pages, p.layers, p.kv_heads, p.most_rows


def most_items(p: AttentionProblem, c: PrefillConfig) -> int:
    """Tiles of rows of all sequences and kv heads, at most."""
    return (p.tokens * p.group // rows_of(c) + min(p.seqs, p.tokens)) * p.kv_heads


def most_counted(p: AttentionProblem) -> int:
    """The same of any starts and configuration: where starts descend, each second sequence may have all
    rows."""
    tiles = ceil_div(p.tokens * p.group, 64 * min(REGISTERS))
    return ceil_div(p.seqs, 2) * tiles * p.kv_heads


def prefill_steps(
    p: AttentionProblem, c: PrefillConfig, chip: Chip, given: Operands, tickets: Scratch
) -> tuple[Memset, Launch]:
    """What runs the kernel over q, k, v, k_scale, v_scale, tables, cu_q_lens, kv_lens, layer, sinks and
    slopes; results 0 and 1 are the output and the logarithms of denominators; `tickets` has TICKET_BYTES."""
    source = prefill_source(p, c)
    k, v = tensor_maps(p, c, given)
    parts = ("k_scale", "v_scale", "tables", "cu_q_lens", "kv_lens", "layer", "sinks", "slopes")
    launch = Launch(
        kernel=compile_kernel(source, arch=chip.arch),
        grid=(max(min(chip.num_sms, most_items(p, c)), 1), 1, 1),
        block=threads_of(c),
        params=(
            Operand(given["q"].index),
            k,
            v,
            *(Operand(given[part].index) for part in parts),
            Result(0),
            Result(1),
            *(Scalar(value, "int32") for value in integers(p)),
            *(Scalar(value, "float32") for value in (p.scale, p.softcap)),
            Scalar(p.window, "int32"),
            tickets,
        ),
        shared_memory=source.shared_memory,
    )
    return Memset(tickets, TICKET_BYTES), launch
