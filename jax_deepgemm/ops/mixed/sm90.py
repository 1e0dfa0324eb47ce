"""The kernels of mixed-input products of compute capability 9.0 (include/jax_deepgemm/mixed/mixed.cuh)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, TensorMap
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.gemm.problem import align_up, ceil_div
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS, SHORT
from jax_deepgemm.ops.mixed.problem import SLAB_BYTES, SLAB_ROWS, MixedProblem

_TOKEN_ROW_BYTES = 128  # of k in a slot
_RESERVED_BYTES = 1024  # what the system takes of an SM's shared memory for each resident block
_MAX_STAGES = 24
_PRODUCER_REGISTERS = 40
_MAX_SEGMENTS, _MAX_N = 2048, 1 << 22  # see ops/grouped/sm90/rules.py
_MANY_TOKENS = 96
_ONCE_TOKENS = 64  # of a weight that one SM reads


@dataclass(frozen=True)
class MixedConfig:
    """How a mixed-input product is cut on SM90.

    Attributes:
      tokens: rows of D in a tile, the width of the instruction.
      across: warpgroups side by side, of 64 rows of the weight each.
      deep: warpgroups that take the blocks of k of a tile in turn.
      stages: slots of the shared-memory ring; one holds a block of k of a tile.
      split_k: blocks of a cluster that share a tile's k (dense products).
      blocks_per_sm: blocks of threads resident on one SM.
    """

    tokens: int
    across: int
    deep: int
    stages: int
    split_k: int = 1
    blocks_per_sm: int = 1

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return self.across * self.deep

    @property
    def height(self) -> int:
        """Rows of the weight in a tile."""
        return SLAB_ROWS * self.across

    @property
    def shares_registers(self) -> bool:
        """Whether consumers take registers from a whole warpgroup of the producer (setmaxnreg)."""
        return self.warpgroups == 2 and self.blocks_per_sm == 1 and self.tokens > _MANY_TOKENS

    @property
    def threads(self) -> int:
        """With the producer's warp, or warpgroup."""
        return 128 * self.warpgroups + (128 if self.shares_registers else 32)

    @property
    def registers(self) -> int:
        """What a consumer thread may use: each of an SM's four sub-partitions has its own register file."""
        if self.shares_registers:
            return 232
        warps = self.blocks_per_sm * ceil_div(self.threads, 32)
        return min(248, 16384 // (32 * ceil_div(warps, 4)) // 8 * 8)

    def __str__(self) -> str:
        split = f" split_k={self.split_k}" if self.split_k > 1 else ""
        shared = f" {self.deep} deep" if self.deep > 1 else ""
        tile = f"{self.tokens} tokens x {self.height}{shared}"
        return f"{tile} stages={self.stages}{split} blocks/SM={self.blocks_per_sm}"


def shared_memory(p: MixedProblem, c: MixedConfig) -> int:
    """Bytes of shared memory of a configuration; mirrors `MixedLayout` in config.cuh, which asserts it."""
    slot = c.tokens * _TOKEN_ROW_BYTES + c.across * SLAB_BYTES + c.tokens * 4 + 2 * 8 + 16
    sums = (c.deep - 1 + c.split_k - 1) * c.tokens * c.height * 4
    return align_up(c.stages * slot + c.deep * c.tokens * 4 + sums + 16 + p.table_bytes, 128)


# Rules -----------------------------------------------------------------------------------------------------

_FIXED_REGISTERS = 64  # two fragments of a weight, and what the loop needs beside its accumulators


def broken_rules(p: MixedProblem, c: MixedConfig, chip: Chip) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    rules = [
        (c.tokens % 8 == 0 and 8 <= c.tokens <= 160, f"tokens is {c.tokens}, must be 8 to 160 in eights"),
        (c.across in (1, 2, 4), f"across is {c.across}, must be 1, 2 or 4"),
        (c.deep in (1, 2, 4), f"deep is {c.deep}, must be 1, 2 or 4"),
        (c.warpgroups <= 4, f"{c.warpgroups} warpgroups, at most 4"),
        (c.split_k in (1, 2, 4, 8), f"split_k is {c.split_k}, must be 1, 2, 4 or 8"),
        (c.split_k == 1 or p.dense, "split_k is for products without groups"),
        (c.split_k <= p.k_blocks, f"split_k is {c.split_k}, more than the blocks of k"),
        (c.stages % c.deep == 0 and c.stages >= 2, f"stages is {c.stages}, must be a multiple of deep, and 2"),
        (c.blocks_per_sm in (1, 2), f"blocks_per_sm is {c.blocks_per_sm}, must be 1 or 2"),
    ]
    broken = [message for holds, message in rules if not holds]
    if not broken and c.tokens + _FIXED_REGISTERS > c.registers:
        broken = [f"{c.tokens} tokens do not fit in {c.registers} registers"]
    return broken


def _refusal(p: MixedProblem) -> str:
    if p.held > _MAX_SEGMENTS:
        return f"{p.held} groups, and the kernel's table has room for {_MAX_SEGMENTS}. Take them in parts"
    return f"n is {p.n}, a tile's record has room for {_MAX_N}" if p.n > _MAX_N else ""


# Choice ----------------------------------------------------------------------------------------------------

_TOKENS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160)
_WARPS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))  # across, deep
_SPREAD = tuple(0.7 + 0.05 * i for i in range(13))  # of group sizes around the expected one


class _Model(NamedTuple):
    """Microseconds and bytes per microsecond, fitted to sweeps on an H200."""

    start: float = 3.06
    alone: tuple[float, float] = (0.146, 0.00117)  # a block of k in one warpgroup by itself: fixed, a token
    shared: tuple[float, float] = (0.102, 0.00137)  # what a warpgroup takes of an SM for it: fixed, a token
    end: tuple[float, float] = (0.603, 0.0159)  # of a tile: fixed, a token
    gather: float = 0.0006  # sums of warpgroups, a token
    cluster: tuple[float, float] = (0.545, 0.0056)  # sums of another block: fixed, a token
    second: float = 0.66  # that there is another block on an SM
    memory: float = 3.65e6
    feed: float = 1.08e5  # into one SM, weights and tokens
    overlap: float = 0.168  # of the smaller one of compute and memory


_MODEL = _Model()


@dataclass(frozen=True)
class MixedCost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launch, first bytes, last stores, and what of computing and reading does not overlap.
      compute: of all waves of tiles.
      memory: reading the weights from memory, or all that tiles need through L2.
    """

    start: float
    compute: float
    memory: float

    @property
    def total(self) -> float:
        return self.start + max(self.compute, self.memory)

    def __str__(self) -> str:
        return f"{self.total:.1f} us (start {self.start:.1f}, compute {self.compute:.1f}, memory {self.memory:.1f})"


def cost(p: MixedProblem, c: MixedConfig, chip: Chip, model: _Model = _MODEL) -> MixedCost:
    """What a configuration costs on a problem: the share of an SM that its warpgroups need, or how long one
    of them takes for a block of k by itself."""
    sizes = [p.tokens] if p.dense else [max(1, round(p.tokens * factor)) for factor in _SPREAD]
    tall = sum(ceil_div(size, c.tokens) for size in sizes) / len(sizes)
    tiles = p.hit * tall * ceil_div(p.n, c.height)
    resident = chip.num_sms * c.blocks_per_sm // c.split_k
    waves = tiles / resident if tiles > 4 * resident else math.ceil(tiles / resident)
    beside = max(1.0, c.blocks_per_sm * min(1.0, tiles / resident)) * c.warpgroups

    def line(terms: tuple[float, float]) -> float:
        return terms[0] + terms[1] * c.tokens

    blocks = ceil_div(ceil_div(p.k_blocks, c.split_k), c.deep)
    end = line(model.end) + model.gather * c.tokens * (c.deep > 1) + line(model.cluster) * (c.split_k - 1)
    compute = waves * (blocks * max(line(model.alone), beside * line(model.shared)) + end)
    reads = tiles * p.k_blocks * (c.tokens * _TOKEN_ROW_BYTES + c.across * SLAB_BYTES)
    sms = min(1.0, tiles * c.split_k / chip.num_sms) * chip.num_sms
    memory = max(p.weight_bytes / model.memory, reads / (sms * model.feed))
    overlap = model.overlap * min(compute, memory)
    return MixedCost(model.start + model.second * (c.blocks_per_sm - 1) + overlap, compute, memory)


def _fitted(p: MixedProblem, c: MixedConfig, chip: Chip) -> MixedConfig | None:
    """With as many stages as shared memory holds."""
    capacity = chip.smem_per_block
    if c.blocks_per_sm > 1:
        capacity = (chip.smem_per_block + _RESERVED_BYTES) // c.blocks_per_sm - _RESERVED_BYTES
    for stages in range(_MAX_STAGES // c.deep * c.deep, max(3, c.deep) - 1, -c.deep):
        fitted = replace(c, stages=stages)
        if shared_memory(p, fitted) <= capacity:
            return None if broken_rules(p, fitted, chip) else fitted
    return None


def candidates(p: MixedProblem, chip: Chip) -> Iterator[MixedConfig]:
    """Every configuration worth comparing."""
    most = min(p.tokens if p.dense else math.ceil(p.tokens * _SPREAD[-1]), _TOKENS[-1])
    splits = (1, 2, 4, 8) if p.dense else (1,)
    enough = next(t for t in _TOKENS if t >= most)
    for tokens, (across, deep), split_k, resident in product(_TOKENS, _WARPS, splits, (1, 2)):
        if tokens <= enough:
            one = _fitted(p, MixedConfig(tokens, across, deep, 0, split_k, resident), chip)
            if one is not None:
                yield one


# Source ----------------------------------------------------------------------------------------------------

_TEXT = """\
#include <jax_deepgemm/mixed/mixed.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  static constexpr int ROWS = {tokens}, COLS = {height}, DEEP = {deep}, SPLITS = {splits};
  static constexpr int STAGES = {stages}, TABLE_BYTES = {table}, SHARED_BYTES = {shared};
  static constexpr bool DENSE = {dense}, ONCE = {once}, HALVES = false;
  static constexpr jdg::Grouping GROUPING = jdg::Grouping::{grouping};
  static constexpr bool SEGMENTED = {segmented}, ZERO_ROWS = {zero_rows}, CHAINED = false;
  static constexpr bool WHOLE_BLOCKS = false;
  static constexpr int REGISTERS = {registers}, PRODUCER_REGISTERS = {producer_registers};
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks_per_sm}) {name}({parameters}) {{
  const jdg::MixedOperands operands = {{&a_map, a_scales, slabs, k_blocks}};
  const jdg::Groups groups = {{{sizes}, {offset}, total, here, weights, m}};
  jdg::mixed<Config>(operands, groups, {{m, n, 1, 0, stripe}}, d);
}}
"""
_INTEGERS = ("m", "n", "k_blocks", "stripe", "total", "here", "weights")
_ENUM = {"dense": "kRows", ROWS: "kRows", MASKED_ROWS: "kMaskedRows"}


def _cpp(value: bool) -> str:
    return str(value).lower()


def _described(p: MixedProblem) -> tuple[str, ...]:
    """Operands that say which rows are whose."""
    return {ROWS: ("group_sizes", "group_offset"), MASKED_ROWS: ("group_sizes",)}.get(p.grouping, ())


def _once(p: MixedProblem) -> bool:
    return p.tokens <= _ONCE_TOKENS


def _name(p: MixedProblem, c: MixedConfig) -> str:
    kind = "mixed" if p.dense else f"{SHORT[p.grouping]}_mixed"
    parts = ["jdg", kind, "e4m3_fp4", f"{c.tokens}x{c.height}", f"d{c.deep}", f"s{c.stages}"]
    parts += [f"k{c.split_k}"] if c.split_k > 1 else []
    parts += [f"x{c.blocks_per_sm}"] if c.blocks_per_sm > 1 else []
    parts += ["f32"] if p.out == "float32" else []
    parts += ["once"] if _once(p) else []
    parts += [] if p.dense else [f"g{p.capacity}"]
    parts += ["seg"] if p.segmented else []
    parts += ["zero"] if p.zero_rows else []
    return "_".join(parts)


def _source(p: MixedProblem, c: MixedConfig) -> KernelSource:
    described = _described(p)
    out = "float" if p.out == "float32" else "jdg::bf16"
    pointers = ["const float* a_scales", "const jdg::u8* slabs", f"{out}* d"]
    pointers += [f"const int* {part}" for part in described]
    maps = ["const __grid_constant__ jdg::TensorMap a_map"]
    name = _name(p, c)
    text = _TEXT.format(
        mma=wgmma_wrapper(c.tokens, "e4m3", "e4m3", a_in_registers=True),
        out=out,
        tokens=c.tokens,
        height=c.height,
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
        producer_registers=_PRODUCER_REGISTERS if c.shares_registers else 0,
        threads=c.threads,
        blocks_per_sm=c.blocks_per_sm,
        name=name,
        parameters=", ".join([*maps, *pointers, *(f"int {x}" for x in _INTEGERS)]),
        sizes=described[0] if described else "nullptr",
        offset=described[1] if len(described) > 1 else "nullptr",
    )
    fields = ("tokens", "across", "deep", "stages", "split_k", "blocks_per_sm")
    shown = (("problem", str(p)), *((field, getattr(c, field)) for field in fields))
    return KernelSource(name, text, shown, shared_memory=shared_memory(p, c))


# Plan ------------------------------------------------------------------------------------------------------


def _tokens_map(p: MixedProblem, c: MixedConfig, index: int) -> TensorMap:
    """A map (k, rows, groups), of boxes of a block of k of a tile's tokens."""
    matrices = p.groups if p.grouping == MASKED_ROWS else 1
    strides = (p.k, p.m * p.k)
    box = (_TOKEN_ROW_BYTES, c.tokens, 1)
    return TensorMap(Operand(index), "uint8", (p.k, p.m, matrices), strides, box, 128)


def _grid(p: MixedProblem, c: MixedConfig, chip: Chip) -> int:
    rows = p.m if not p.grouping == MASKED_ROWS else p.groups * p.m
    edges = {ROWS: p.segments + 1, MASKED_ROWS: p.groups}.get(p.grouping, 0)
    tiles = (ceil_div(rows, c.tokens) + edges) * ceil_div(p.n, c.height)
    return tiles * c.split_k if c.split_k > 1 else min(tiles, chip.num_sms * c.blocks_per_sm)


def _plan(p: MixedProblem, c: MixedConfig, chip: Chip, operands: Operands) -> LaunchPlan:
    integers = {
        "m": p.m,
        "n": p.n,
        "k_blocks": p.k_blocks,
        "stripe": max(1, min(ceil_div(p.m, c.tokens), 8)),
        "total": p.segments,
        "here": p.groups,
        "weights": p.weights,
    }
    pointers = [Operand(operands[part].index) for part in ("a_scales", "slabs")]
    described = [Operand(operands[part].index) for part in _described(p)]
    scalars = (Scalar(integers[name], "int32") for name in _INTEGERS)
    launch = Launch(
        kernel=compile_kernel(_source(p, c), arch=chip.arch),
        grid=(_grid(p, c, chip), 1, 1),
        block=c.threads,
        params=(_tokens_map(p, c, operands["a"].index), *pointers, Result(0), *described, *scalars),
        cluster=c.split_k,
        shared_memory=shared_memory(p, c),
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[MixedProblem, MixedConfig](
    config=MixedConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=broken_rules,
    refusal=_refusal,
    shared_bytes=shared_memory,
    sources=lambda p, c: [_source(p, c)],
    plan=_plan,
)
