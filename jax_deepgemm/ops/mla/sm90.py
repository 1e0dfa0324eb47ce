"""Latent attention on Hopper: configurations, rules, costs, source texts and launches;
include/jax_deepgemm/mla/mla.cuh says how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, Scratch
from jax_deepgemm.core.parameters import Param
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.mla.family import MlaConfig
from jax_deepgemm.ops.mla.problem import MOST_DEPTH, MOST_SEQUENCES, MOST_V_DEPTH, PAGES, ROWS, MlaProblem

THREADS, WARPS = 384, 12
KEYS, STAGES, TEAMS = 32, 4, (1, 2, 4)
"""Keys of a tile, tiles of a block at a time, blocks of a team."""
HELD, MOST_HELD = (20, 16), 24
"""Steps of queries in registers that are worth comparing, and those that compile."""
MOST_HEADS, MOST_WEIGHTS = 65_535, 2**31 - 1
FEW_ROWS = 256
"""Results up to which a block of threads adds up the pieces of one, else of eight, a warp each."""
_ALL = 2**31 - 1
_SLAB = 128

# MlaConfig of include/jax_deepgemm/mla/problem.cuh says what each field means.
_CONFIG = """\
namespace scores {{{scores}}}
namespace held {{{held_scores}}}
namespace left {{{left}}}
namespace right {{{right}}}
struct Config {{
  using T = jdg::{dtype};
  using Scores = scores::Mma;
  using HeldScores = held::Mma;
  using LeftSums = left::Mma;
  using RightSums = right::Mma;
  static constexpr bool F16 = {is_f16}, CAUSAL = {causal}, SPARSE = {sparse};
  static constexpr int D = {depth}, DV = {v_depth}, PAGE = {page};
  static constexpr int LEFT = {left_columns}, RIGHT_PARTS = {right_parts}, HELD = {held};
  static constexpr int TEAM = {team}, SHARED_BYTES = {shared};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks}) {name}(
    const jdg::{dtype}* q, const jdg::{dtype}* cache, const int* tables, const int* starts,
    const int* lengths, const int* layer, jdg::{dtype}* out, float* lse, float* parts, float* part_stats,
    int tokens, int heads, int sequences, int columns, int pages, int layers, int most_rows, float scale,
    int split, int most_weights, int teams) {{
  const jdg::MlaCall<jdg::{dtype}> call = {{q, cache, tables, starts, lengths, layer, out, lse, tokens,
                                           heads, sequences, columns, pages, layers, most_rows, scale}};
"""
_MAIN = """\
#include <jax_deepgemm/mla/mla.cuh>

{config}  jdg::mla<Config>(call, {{split, most_weights}}, parts, part_stats);
}}
"""
_MERGE = """\
#include <jax_deepgemm/mla/merge.cuh>

{config}  jdg::mla_merge<Config, {warps}, {rows}>(call, {{split, most_weights}}, parts, part_stats, teams);
}}
"""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def layout_bytes(p: MlaProblem) -> int:
    """Of shared memory but the prefix sums; mirrors MlaLayout, which asserts it."""
    slabs = p.depth // 64
    rows = slabs * (ROWS + STAGES * KEYS) + ROWS  # queries, keys, weights
    return rows * _SLAB + ROWS * 4 + 32 * (STAGES + 2)


def columns(p: MlaProblem, c: MlaConfig) -> tuple[int, int, int]:
    """Of the values, those of the scorer and of the adder, and the instructions for the latter."""
    left = ceil_div(p.v_depth // (4 if c.held else 2), 64) * 64
    return left, p.v_depth - left, 2 if p.v_depth - left > 256 else 1


def shared_memory(p: MlaProblem, c: MlaConfig) -> int:
    """Bytes of dynamic shared memory of a block."""
    return layout_bytes(p) + 4 * (WARPS + (0 if p.sparse else p.seqs + 1))


def merge_shape(p: MlaProblem) -> tuple[int, int]:
    """Warps for a result, and results of a block, of the kernel that adds up pieces."""
    return (8, 1) if p.tokens * p.heads <= FEW_ROWS else (1, 8)


def merge_memory(p: MlaProblem) -> int:
    """Bytes of dynamic shared memory of a block that adds up pieces."""
    return 8 * (p.v_depth * 4 + 8) + 4 * (8 + (0 if p.sparse else p.seqs + 1))


def most_units(p: MlaProblem, c: MlaConfig) -> int:
    """Of all sequences, whatever their lengths."""
    rows = ROWS * c.team
    if p.most_rows == 1:
        return min(p.seqs, p.tokens) * ceil_div(p.heads, rows)
    return p.tokens * p.heads // rows + min(p.seqs, p.tokens)


def part_tiles(p: MlaProblem) -> int:
    """Tiles of a part of a sequence, or 0 where blocks' shares decide."""
    return ceil_div(p.split, KEYS)


def most_weights(p: MlaProblem, c: MlaConfig) -> int:
    """What is dealt out, at most."""
    tiles = max(1, ceil_div(p.keys, KEYS))
    return most_units(p, c) * ceil_div(tiles, part_tiles(p) or 1)


def slots(p: MlaProblem, c: MlaConfig, chip: Chip) -> int:
    """Sums of pieces of units, [64 team, v_depth] each."""
    return most_weights(p, c) if p.split else 2 * (chip.num_sms // c.team)


def scratch_bytes(p: MlaProblem, c: MlaConfig, chip: Chip) -> tuple[int, int]:
    """Of the sums of pieces, and of their rows' largest scores and denominators."""
    rows = slots(p, c, chip) * ROWS * c.team
    return rows * p.v_depth * 4, rows * 8


# Rules and choosing ----------------------------------------------------------------------------------------


def problems_with(p: MlaProblem, c: MlaConfig, chip: Chip) -> list[str]:
    """The rules that a configuration breaks."""
    rules = (
        (c.team in TEAMS, f"team is {c.team}, need one of {TEAMS}"),
        (c.team <= chip.num_sms, f"teams of {c.team} blocks, and {chip.num_sms} SMs may be used"),
        (0 <= c.held <= MOST_HELD, f"held is {c.held}, need 0 to {MOST_HELD}: registers"),
    )
    return [words for kept, words in rules if not kept]


def refusal(p: MlaProblem) -> str:
    """Why no configuration can run a problem."""
    rules = (
        (p.page in PAGES, f"pages have {p.page} keys, need one of {PAGES}"),
        (
            p.depth % 64 == 0 and p.depth <= MOST_DEPTH,
            f"keys are {p.depth} wide, need a multiple of 64 up to {MOST_DEPTH}: pad them",
        ),
        (
            p.v_depth % 128 == 0 and p.v_depth <= min(MOST_V_DEPTH, p.depth),
            f"values are {p.v_depth} wide, need a multiple of 128 up to {MOST_V_DEPTH}",
        ),
        (
            p.sparse or p.seqs <= MOST_SEQUENCES,
            f"{p.seqs} sequences, at most {MOST_SEQUENCES} in a call: cut the batch",
        ),
        (p.heads <= MOST_HEADS, f"{p.heads} heads, at most {MOST_HEADS}"),
        (
            max(p.pages * p.page, p.keys) <= MOST_WEIGHTS,
            "a layer or a table has more keys than a kernel counts",
        ),
        (
            most_weights(p, MlaConfig()) <= MOST_WEIGHTS,
            "rows times keys are more than a launch counts: cut the batch",
        ),
    )
    return "; ".join(words for kept, words in rules if not kept)


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launches, prefix sums, the first keys.
      running: tiles of the busiest block.
    """

    start: float
    running: float

    @property
    def total(self) -> float:
        return self.start + self.running

    def __str__(self) -> str:
        return f"{self.total:.1f} us (start {self.start:.1f}, running {self.running:.1f})"


_TILE_US, _BYTES_PER_US = 1.12, 4.1e6
"""Of a tile of an SM, products and powers; read by all SMs. As measured on an H200."""


def cost(p: MlaProblem, c: MlaConfig, chip: Chip) -> Cost:
    """The model's opinion."""
    rows = ROWS * c.team
    units = max(1, p.seqs) * ceil_div(min(p.most_rows, max(1, p.tokens // max(1, p.seqs))) * p.heads, rows)
    tiles = units * ceil_div(p.keys, KEYS)
    teams = chip.num_sms // c.team
    products = ceil_div(tiles, teams) * _TILE_US
    reading = tiles * KEYS * p.depth * 2 / _BYTES_PER_US
    return Cost(5.0, max(products, reading))


def candidates(p: MlaProblem, chip: Chip) -> Iterator[MlaConfig]:
    """Teams that have no more blocks than a sequence has rows for, and there are SMs for."""
    for team in TEAMS:
        if team == 1 or (ROWS * (team // 2) < p.most_rows * p.heads and team <= chip.num_sms):
            yield from (MlaConfig(team, held) for held in HELD)


# Sources and launches --------------------------------------------------------------------------------------


def _name(p: MlaProblem, c: MlaConfig, kind: str) -> str:
    parts = [
        "jdg",
        "sparse_mla" if p.sparse else "mla",
        kind,
        p.dtype,
        f"d{p.depth}v{p.v_depth}",
        f"p{p.page}",
    ]
    parts += [f"h{c.held}", f"t{c.team}", *["full"] * (not p.causal and not p.sparse)]
    return "_".join(filter(None, parts))


def _text(p: MlaProblem, c: MlaConfig, name: str, threads: int, blocks: int) -> str:
    left, right, parts = columns(p, c)
    values = {"b_k_major": False}
    return _CONFIG.format(
        scores=wgmma_wrapper(KEYS, p.dtype, p.dtype),
        held_scores=wgmma_wrapper(KEYS, p.dtype, p.dtype, a_in_registers=True),
        left=wgmma_wrapper(left, p.dtype, p.dtype, **values, a_in_registers=True),
        right=wgmma_wrapper(right // parts, p.dtype, p.dtype, **values),
        left_columns=left,
        right_parts=parts,
        held=min(c.held, p.depth // 16),
        name=name,
        dtype=p.dtype,
        is_f16=str(p.dtype == "f16").lower(),
        causal=str(p.causal).lower(),
        sparse=str(p.sparse).lower(),
        depth=p.depth,
        v_depth=p.v_depth,
        page=p.page,
        team=c.team,
        shared=layout_bytes(p),
        threads=threads,
        blocks=blocks,
    )


def main_source(p: MlaProblem, c: MlaConfig) -> KernelSource:
    """The source of the kernel that reads keys, equal for all batches and caches."""
    name = _name(p, c, "")
    text = _MAIN.format(config=_text(p, c, name, THREADS, 1))
    return KernelSource(name, text, (("problem", str(p)), ("config", str(c))), shared_memory(p, c))


def merge_source(p: MlaProblem, c: MlaConfig) -> KernelSource:
    """The source of the kernel that adds up pieces."""
    warps, rows = merge_shape(p)
    name = _name(p, c, f"merge{rows}")
    text = _MERGE.format(config=_text(p, c, name, 256, 1), warps=warps, rows=rows)
    return KernelSource(name, text, (("problem", str(p)), ("config", str(c))), merge_memory(p))


def numbers(p: MlaProblem) -> tuple[int, ...]:
    """The kernels' integers before `scale`."""
    rows = 1 if p.sparse else p.max_q_len or _ALL
    return p.tokens, p.heads, p.seqs, p.columns, p.pages, p.layers, rows


def _plan(p: MlaProblem, c: MlaConfig, chip: Chip, given: Operands) -> LaunchPlan:
    teams = chip.num_sms // c.team
    tables = Operand(given["tables"].index)
    params: tuple[Param, ...] = (
        Operand(given["q"].index),
        Operand(given["cache"].index),
        tables,
        *(Operand(given[part].index) if part in given else tables for part in ("cu_q_lens", "kv_lens")),
        Operand(given["layer"].index),
        *(Result(0), Result(1), Scratch(0), Scratch(1)),
        *(Scalar(number, "int32") for number in numbers(p)),
        Scalar(p.scale, "float32"),
        *(Scalar(number, "int32") for number in (part_tiles(p), most_weights(p, c), teams)),
    )
    reading, adding = main_source(p, c), merge_source(p, c)
    launches = (
        Launch(
            kernel=compile_kernel(reading, arch=chip.arch),
            grid=(teams * c.team, 1, 1),
            block=THREADS,
            params=params,
            shared_memory=reading.shared_memory,
        ),
        Launch(
            kernel=compile_kernel(adding, arch=chip.arch),
            grid=(p.tokens, ceil_div(p.heads, merge_shape(p)[1]), 1),
            block=256,
            params=params,
            shared_memory=adding.shared_memory,
            pdl=True,
        ),
    )
    return LaunchPlan(launches, scratch_bytes(p, c, chip), label=str(p))


KERNELS = Kernels[MlaProblem, MlaConfig](
    config=MlaConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=problems_with,
    refusal=refusal,
    shared_bytes=shared_memory,
    sources=lambda p, c: [main_source(p, c), merge_source(p, c)],
    plan=_plan,
)
