"""Projections of wide rows on Hopper: problem and configuration -> source text and LaunchPlan;
include/jax_deepgemm/hc_prenorm/ says how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, Scratch, TensorMap
from jax_deepgemm.core.parameters import Buffer
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.hc_prenorm.family import BLOCK, MOST_SPLITS, HcPrenormConfig, HcPrenormProblem, beyond

ROWS, GROUPS = (128, 256, 64), (4, 2, 1)
MOST_WARPGROUPS, MOST_STAGES = 4, 16
REGISTERS = 65536
_OWN_REGISTERS = 64
"""Of a consumer thread, beside its sums."""
OUTPUTS, MOST_PARTS = 256, 8
"""Threads of a block that sums splits, and how many share a sum at most."""
READ_ONCE = 16 << 20
"""Bytes of A from which on its lines are the first to leave L2, where they would not stay anyway."""

# PrenormConfig of include/jax_deepgemm/hc_prenorm/hc_prenorm.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/hc_prenorm/hc_prenorm.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  static constexpr int ROWS = {rows}, COLS = {cols}, GROUPS = {groups}, STAGES = {stages};
  static constexpr int SHARED_BYTES = {shared};
  static constexpr bool ONCE = {once};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(
    const __grid_constant__ jdg::TensorMap a, const __grid_constant__ jdg::TensorMap b, float* d,
    float* squares, int m, int n, int blocks, int splits) {{
  jdg::hc_prenorm<Config>(a, b, d, squares, {{m, n, blocks, splits}});
}}
"""

_SUM_TEXT = """\
#include <jax_deepgemm/hc_prenorm/sum.cuh>

extern "C" __global__ void __launch_bounds__({threads}) {name}(
    const float* ds, const float* all_squares, float* d, float* squares, jdg::i64 mn, int m, int splits) {{
  jdg::sum_splits<{outputs}, {parts}>(ds, all_squares, d, squares, mn, m, splits);
}}
"""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def columns_of(p: HcPrenormProblem) -> int:
    """Columns as the kernel has them: wgmma's come in eights."""
    return ceil_div(p.n, 8) * 8


def tiles_of(p: HcPrenormProblem, c: HcPrenormConfig) -> int:
    """Tiles of rows."""
    return ceil_div(p.m, c.rows)


def warpgroups_of(c: HcPrenormConfig) -> int:
    """That multiply; one more warp loads."""
    return c.rows // 64 * c.groups


def threads_of(c: HcPrenormConfig) -> int:
    """Of a block."""
    return 128 * warpgroups_of(c) + 32


def slot_bytes(p: HcPrenormProblem, c: HcPrenormConfig) -> int:
    """Of 64 numbers of k: rows of A in bfloat16, those of B in float32."""
    return BLOCK * (2 * c.rows + 4 * columns_of(p))


def shared_memory(p: HcPrenormProblem, c: HcPrenormConfig) -> int:
    """Bytes of shared memory; mirrors PrenormLayout, which asserts it. 32 of each slot are the pipeline's."""
    return c.stages * (slot_bytes(p, c) + 32)


def problems_with(p: HcPrenormProblem, c: HcPrenormConfig) -> list[str]:
    """The rules that a configuration breaks."""
    registers = columns_of(p) // 2 + _OWN_REGISTERS
    warps = ceil_div(threads_of(c), 128) * 4  # which get registers in fours
    room = min(REGISTERS // (32 * max(warps, 4)) // 8 * 8, 255)
    sums = (c.groups - 1) * 2 * c.rows * (columns_of(p) // 2 + 2) * 4
    rules = (
        (c.rows in ROWS, f"rows is {c.rows}, need one of {ROWS}"),
        (c.groups in GROUPS, f"groups is {c.groups}, need one of {GROUPS}"),
        (
            warpgroups_of(c) <= MOST_WARPGROUPS,
            f"{c.rows} rows by {c.groups} groups are {warpgroups_of(c)} warpgroups, at most "
            f"{MOST_WARPGROUPS}",
        ),
        (1 <= c.stages <= MOST_STAGES, f"stages is {c.stages}, need 1 to {MOST_STAGES}"),
        (
            c.groups not in GROUPS or c.stages % c.groups == 0,
            f"stages is {c.stages}, need a multiple of {c.groups}, the groups",
        ),
        (
            sums <= c.stages * slot_bytes(p, c),
            f"sums of {c.groups} groups take {sums} bytes, {c.stages} slots have "
            f"{c.stages * slot_bytes(p, c)}",
        ),
        (
            registers <= room,
            f"{columns_of(p)} columns need {registers} registers of a thread, {threads_of(c)} threads have "
            f"{room} each",
        ),
        (1 <= c.splits <= MOST_SPLITS, f"splits is {c.splits}, need 1 to {MOST_SPLITS}"),
        (
            p.num_splits in (0, c.splits),
            f"splits is {c.splits}, need {p.num_splits}, those that the call returns",
        ),
    )
    return [words for kept, words in rules if not kept]


# Choosing --------------------------------------------------------------------------------------------------

# Derived, from rates of an H200 (docs/performance.md) and the instructions of a block of k.
_CLOCK = 1.75e3  # of a microsecond, under load
_START = 3.0
_READ = 4.2e6  # bytes of a microsecond, from memory
_L2_BYTES = 30.0  # of a cycle and an SM
_EACH_BLOCK, _EACH_OF_MANY = 480.0, 200.0  # cycles of 64 rows by 64 of k: one warpgroup alone, and at best
_WAITS = 0.1  # a slot's worth: while it is read, its bytes are not asked for
_SUM_START, _SUM_BYTES = 1.8, 3.0e6


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launch, first bytes, last stores.
      memory: reading A and B once.
      busiest: what the busiest SM reads from L2 or multiplies, whichever takes longer.
      sums: adding up the splits.
    """

    start: float
    memory: float
    busiest: float
    sums: float

    @property
    def total(self) -> float:
        return self.start + max(self.memory, self.busiest) + 0.1 * min(self.memory, self.busiest) + self.sums

    def __str__(self) -> str:
        terms = f"memory {self.memory:.1f}, busiest SM {self.busiest:.1f}, sums {self.sums:.1f}"
        return f"{self.total:.1f} us (start {self.start:.1f}, {terms})"


def cost(p: HcPrenormProblem, c: HcPrenormConfig, chip: Chip) -> Cost:
    """The model's opinion."""
    waves = ceil_div(tiles_of(p, c) * c.splits, chip.num_sms)
    blocks = waves * ceil_div(p.blocks, c.splits)
    multiply = max(_EACH_BLOCK / warpgroups_of(c), _EACH_OF_MANY) * c.rows / 64
    results = 4 * p.m * (p.n + 1)
    summed = c.splits > 1 and not p.num_splits
    return Cost(
        _START,
        (p.k * (2 * p.m + 4 * p.n) + results) / _READ * (1 + _WAITS / c.stages),
        blocks * max(slot_bytes(p, c) / _L2_BYTES, multiply) / _CLOCK,
        _SUM_START + results * c.splits / _SUM_BYTES if summed else 0.0,
    )


def candidates(p: HcPrenormProblem, chip: Chip) -> Iterator[HcPrenormConfig]:
    """Every tile and number of groups, with as many slots as fit; splits that fill one to four waves."""
    for rows in ROWS:
        for groups in GROUPS:
            for splits in _splits(p, ceil_div(p.m, rows), chip.num_sms):
                config = HcPrenormConfig(rows, groups, 0, splits)
                fitting = min(chip.smem_per_block // (slot_bytes(p, config) + 32), MOST_STAGES)
                config = HcPrenormConfig(rows, groups, fitting // groups * groups, splits)
                if not problems_with(p, config):
                    yield config


def _splits(p: HcPrenormProblem, tiles: int, sms: int) -> list[int]:
    if p.num_splits:
        return [p.num_splits]
    most = min(p.blocks, MOST_SPLITS)
    return sorted({min(max(waves * sms // tiles, 1), most) for waves in (1, 2, 3, 4)} | {1, most // 4 or 1})


# Launching -------------------------------------------------------------------------------------------------


def kernel_source(p: HcPrenormProblem, c: HcPrenormConfig) -> KernelSource:
    """The source of the kernel that runs `c` on `p`, equal for all m and k of some size, and all splits."""
    once = 2 * p.m * p.k >= READ_ONCE
    parts = ["jdg_hc_prenorm", f"{c.rows}x{c.groups}", f"n{columns_of(p)}", f"s{c.stages}", *["once"] * once]
    name, shared = "_".join(parts), shared_memory(p, c)
    text = _TEXT.format(
        mma=wgmma_wrapper(columns_of(p), "tf32", "tf32", a_in_registers=True),
        rows=c.rows,
        cols=columns_of(p),
        groups=c.groups,
        stages=c.stages,
        shared=shared,
        once=str(once).lower(),
        threads=threads_of(c),
        name=name,
    )
    return KernelSource(name, text, (("problem", str(p)), ("config", str(c))), shared_memory=shared)


def parts_of(c: HcPrenormConfig) -> int:
    """Threads that share one sum over splits: a power of two."""
    return min(1 << (c.splits.bit_length() - 1), MOST_PARTS)


def sum_source(c: HcPrenormConfig) -> KernelSource:
    """The source of the kernel that adds up splits."""
    parts = parts_of(c)
    name = f"jdg_hc_prenorm_sum_{parts}"
    text = _SUM_TEXT.format(threads=OUTPUTS, name=name, outputs=OUTPUTS // parts, parts=parts)
    return KernelSource(name, text, (("parts", parts),), shared_memory=4 * OUTPUTS)


def is_summed(p: HcPrenormProblem, c: HcPrenormConfig) -> bool:
    """Whether splits are added up behind."""
    return c.splits > 1 and not p.num_splits


def _sources(p: HcPrenormProblem, c: HcPrenormConfig) -> list[KernelSource]:
    return [kernel_source(p, c), *([sum_source(c)] if is_summed(p, c) else [])]


def tensor_maps(p: HcPrenormProblem, c: HcPrenormConfig, given: Operands) -> list[TensorMap]:
    """Of A and B, whose rows are whole 16 bytes. B is rounded to TF32 on its way."""
    k, row = p.k, 2 * p.k
    a = TensorMap(
        Operand(given["a"].index), "bfloat16", (k, p.m, 1), (row, row * p.m), (BLOCK, c.rows, 1), 128
    )
    box = (BLOCK // 2, columns_of(p))
    b = TensorMap(Operand(given["b"].index), "tfloat32", (k, p.n), (4 * k,), box, 128)
    return [a, b]


def _plan(p: HcPrenormProblem, c: HcPrenormConfig, chip: Chip, given: Operands) -> LaunchPlan:
    source, summed = kernel_source(p, c), is_summed(p, c)
    results: list[Buffer] = [Result(0), Result(1)]
    to: list[Buffer] = [Scratch(0), Scratch(1)] if summed else results
    steps = [
        Launch(
            kernel=compile_kernel(source, arch=chip.arch),
            grid=(tiles_of(p, c) * c.splits, 1, 1),
            block=threads_of(c),
            params=(
                *tensor_maps(p, c, given),
                *to,
                *(Scalar(size, "int32") for size in (p.m, p.n, p.blocks, c.splits)),
            ),
            shared_memory=source.shared_memory,
        )
    ]
    if not summed:
        return LaunchPlan(tuple(steps), label=str(p))
    added = sum_source(c)
    steps.append(
        Launch(
            kernel=compile_kernel(added, arch=chip.arch),
            grid=(ceil_div(p.m * (p.n + 1), OUTPUTS // parts_of(c)), 1, 1),
            block=OUTPUTS,
            params=(
                *to,
                *results,
                Scalar(p.m * p.n, "int64"),
                *(Scalar(size, "int32") for size in (p.m, c.splits)),
            ),
            shared_memory=added.shared_memory,
            pdl=True,
        )
    )
    sizes = (4 * c.splits * p.m * p.n, 4 * c.splits * p.m)
    return LaunchPlan(tuple(steps), sizes, label=str(p))


KERNELS = Kernels[HcPrenormProblem, HcPrenormConfig](
    config=HcPrenormConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=lambda p, c, chip: problems_with(p, c),
    refusal=lambda p: beyond(p.m, p.k, p.n),
    shared_bytes=shared_memory,
    sources=_sources,
    plan=_plan,
)
