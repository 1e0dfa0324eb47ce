"""Grouped GEMMs on SM90: problem -> candidates -> cost -> configuration -> launch plan.

The kernel (include/jax_deepgemm/gemm_grouped.cuh) is the persistent GEMM with another way from a tile's
number to its place: group sizes are read on the device. What is static, and what a configuration is chosen
for, is the expected size of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Scalar
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import (
    GemmConfig,
    GemmProblem,
    ceil_div,
    fit_stages,
    passes,
    problems_with,
    shared_memory,
    tma_store,
)
from jax_deepgemm.sm90.cost import START, Cost, kind_of, per_block, persistent_tiles
from jax_deepgemm.sm90.plan import (
    GemmOperands,
    copy_of_c,
    pointers,
    stripe_height,
    tensor_maps,
)
from jax_deepgemm.sm90.source import (
    as_cpp,
    config_text,
    described,
    kernel_name,
    leading_parameters,
    out_type,
    product,
    reads_c,
    sides,
)
from jax_deepgemm.sm90.tuning import tuned

ROWS, MASKED_ROWS, INNER, MASKED_INNER = "rows", "masked_rows", "inner", "masked_inner"
_ENUM = {ROWS: "kRows", MASKED_ROWS: "kMaskedRows", INNER: "kInner", MASKED_INNER: "kMaskedInner"}
_SHORT = {ROWS: "m_grouped", MASKED_ROWS: "m_masked", INNER: "k_grouped", MASKED_INNER: "k_masked"}
_SPREAD = tuple(0.7 + 0.05 * i for i in range(13))  # of group sizes around the expected one
_SEGMENT_BYTES = 16
_FEW_ROWS = 64  # of a group: about one SM reads each of its weights
_MAX_SEGMENTS = 2048  # a tile's record has 12 bits for its segment, ...
_MAX_N = 1 << 22  # ... and 19 for its column, in eights


@dataclass(frozen=True)
class GroupedProblem:
    """D = A B^T for each group.

    Attributes:
      grouping: "rows" (rows of A and D are grouped), "masked_rows" (one matrix A for each group, of which the
        first rows count), "inner" (k is grouped, D is [groups, m, n]) or "masked_inner".
      groups: groups of this device.
      m: rows of A and D in all ("rows"), of one group (otherwise).
      k: extent of A and B along k.
      expected: rows ("rows", "masked_rows") or k of a group that the configuration is chosen for.
      segments: entries of the device's description of groups.
      segmented: whether that description is starts | ends | groups, or just sizes.
      weights: groups of B ("masked_rows": used by group modulo this).
      zero_rows: "masked_rows": whether rows beyond those that count are stored as zeros.
      a, b, layout, out, add_c, b_scales: as in GemmProblem.
    """

    grouping: str
    groups: int
    m: int
    n: int
    k: int
    expected: int
    segments: int
    segmented: bool = False
    weights: int = 1
    zero_rows: bool = False
    a: str = "e4m3"
    b: str = "e4m3"
    layout: str = "nt"
    out: str = "bfloat16"
    add_c: bool = False
    b_scales: str = "block"

    @property
    def inner(self) -> bool:
        """Whether k is what is grouped."""
        return self.grouping in (INNER, MASKED_INNER)

    @cached_property
    def capacity(self) -> int:
        """Segments that the table in shared memory has room for: a power of two, to share kernels."""
        return max(32, 1 << (self.held - 1).bit_length())

    @property
    def held(self) -> int:
        """Segments in the table."""
        return self.segments if self.grouping == ROWS and self.segmented else self.groups

    @cached_property
    def gemm(self) -> GemmProblem:
        """One group of the expected size, with what the table takes of shared memory."""
        head_end_and_totals = 3
        return GemmProblem(
            m=self.m if self.inner else self.expected,
            n=self.n,
            k=self.expected if self.inner else self.k,
            a=self.a,
            b=self.b,
            layout=self.layout,
            out=self.out,
            add_c=self.add_c,
            b_scales=self.b_scales,
            table_bytes=(self.capacity + head_end_and_totals) * _SEGMENT_BYTES,
            weights=self._weights_read_once,
        )

    @property
    def _weights_read_once(self) -> int:
        """How many matrices B there are, or 0 where several groups share them or a group has many rows."""
        held = self.weights if self.grouping == MASKED_ROWS else self.groups
        uses = self.segments if self.segmented else self.groups
        return held if not self.inner and self.expected <= _FEW_ROWS and uses <= 2 * held else 0

    @property
    def rows_bound(self) -> int:
        """Rows of tiles at most; the grid needs no more blocks than that makes tiles."""
        return self.m if self.grouping == ROWS else self.groups * self.m

    @property
    def flops(self) -> int:
        """Multiplications and additions if every row belongs to a group; how many do, only the run knows."""
        matrices = 1 if self.grouping in (ROWS, INNER) else self.groups
        return 2 * matrices * self.m * self.n * self.k

    def kernel_sources(self, chip: Chip) -> list[KernelSource]:
        """What `jax_deepgemm.precompile` compiles for this problem: the kernel that would be chosen."""
        return [grouped_source(self, choose_grouped(self, chip))]

    def ranked(self, chip: Chip) -> list[tuple[GemmConfig, Cost]]:
        """Candidates with their cost, the cheapest first."""
        priced = [(c, grouped_cost(self, c, chip)) for c in grouped_candidates(self, chip)]
        return sorted(priced, key=lambda pair: pair[1].total)

    def shared_bytes(self, c: GemmConfig) -> int:
        """Shared memory of a block of threads."""
        return shared_memory(self.gemm, c).total

    def __str__(self) -> str:
        parts = [f"{_SHORT[self.grouping]} {self.a}x{self.b} {self.layout} groups={self.groups}"]
        parts += [f"m={self.m} n={self.n} k={self.k} expected={self.expected} -> {self.out}"]
        parts += ["+C"] if self.add_c else []
        parts += (
            [f"B scales {'128x128' if self.b_scales == 'block' else '1x128'}"] if self.gemm.is_fp8 else []
        )
        return " ".join(parts)


def problems_with_grouped(p: GroupedProblem, c: GemmConfig) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    if p.held > _MAX_SEGMENTS:
        return [_too_many(p)]
    broken = ["swap_ab and split_k are for dense GEMMs"] if c.one_tile else []
    broken += [f"n is {p.n}, a tile's record has room for {_MAX_N}"] if p.n > _MAX_N else []
    return broken + problems_with(p.gemm, c)


_IN_PARTS = {
    ROWS: "a slice of b with group_offset= (group_sizes stay whole), and the sum of the results",
    INNER: "num_groups= with group_offset= (group_sizes stay whole), and the results one behind the other",
    MASKED_ROWS: "slices of the operands, and the results one behind the other",
    MASKED_INNER: "slices of the operands, and the results one behind the other",
}


def _too_many(p: GroupedProblem) -> str:
    return (
        f"{p.held} groups (vmap's batch times its groups), and the kernel's table has room for "
        f"{_MAX_SEGMENTS}. Take them in parts: {_IN_PARTS[p.grouping]}; or jax.lax.map instead of jax.vmap"
    )


# Tiles that can win -> microseconds that 128 bytes of k of one tile take on one SM, as in cost.py, but of
# kernels that mostly run for long enough to reach the power limit.
_PER_BLOCK = {
    "fp8 block": {
        (64, 64): 0.1912,
        (64, 96): 0.1704,
        (64, 112): 0.1995,
        (64, 128): 0.2282,
        (64, 192): 0.378,
        (64, 256): 0.516,
        (128, 128): 0.4012,
        (128, 192): 0.557,
        (128, 256): 0.7477,
        (192, 128): 0.5612,
        (256, 128): 0.7425,
    },
    "fp8 vector": {
        (64, 128): 0.44,
        (128, 128): 0.68,
        (128, 160): 0.84,
    },
    "fp8 slices": {
        (64, 128): 0.7357,
        (128, 128): 0.5668,
        (128, 160): 0.7183,
        (192, 128): 0.7598,
        (256, 96): 0.7772,
        (256, 128): 1.04,
    },
    "bf16": {
        (64, 64): 0.1809,
        (64, 96): 0.1533,
        (64, 112): 0.1771,
        (64, 128): 0.2013,
        (128, 128): 0.3842,
        (128, 192): 0.5157,
        (128, 256): 0.6841,
    },
    "bf16 ping-pong": {
        (128, 128): 0.3538,
        (128, 160): 0.4271,
        (128, 176): 0.4767,
        (128, 192): 0.4872,
    },
}
# Microseconds of any tile beside its blocks, and for each element of a bf16 D.
_PER_TILE = {
    "fp8 block": (0.5942, 6.49e-06),
    "fp8 vector": (0.2, 2.0e-5),
    "fp8 slices": (0.00168, 8.836e-06),
    "bf16": (0.002294, 2.711e-05),
    "bf16 ping-pong": (0.003022, 2.991e-05),
}
_MEMORY_BYTES_PER_US = 3.794e6
_READ_AGAIN = 0.1  # of a group's B, which leaves L2 before the SM with its next row tile has it
_MANY_WAVES = 4  # from here on tiles of different lengths even out
_HALF = 0.54  # what half a tile costs of a whole one


def grouped_candidates(p: GroupedProblem, chip: Chip) -> Iterator[GemmConfig]:
    """Every configuration worth comparing."""
    for tile in persistent_tiles(_PER_BLOCK, p.gemm):
        fitted = fit_stages(p.gemm, tile, chip)
        if fitted is not None and not problems_with_grouped(p, fitted):
            yield fitted


def grouped_cost(p: GroupedProblem, c: GemmConfig, chip: Chip) -> Cost:
    """The dense model, summed over groups of sizes around the expected one."""
    col_tiles = ceil_div(p.n, c.block_n)
    if p.inner:
        row_tiles = float(ceil_div(p.m, c.block_m))
    else:
        sizes = [max(1, round(p.expected * factor)) for factor in _SPREAD]
        row_tiles = sum(ceil_div(size, c.block_m) for size in sizes) / len(sizes)
    tiles = p.groups * row_tiles * col_tiles
    waves = _waves(tiles / chip.num_sms, halves(p, c))
    traffic = (2 if p.out == "float32" else 1) * (2 if p.add_c else 1)
    kind = kind_of(p.gemm, c.ping_pong)
    fixed, for_each = _PER_TILE[kind]
    per_tile = fixed + for_each * c.block_m * c.block_n * traffic
    compute = waves * (per_tile + p.gemm.k_blocks * per_block(_PER_BLOCK[kind], c))
    again = 0 if p.inner else _READ_AGAIN * min(row_tiles - 1, 1) * p.n * p.gemm.row_bytes
    moved = p.groups * (p.gemm.bytes_moved + again)
    start = START["fp8" if p.gemm.is_fp8 else "bf16"]
    return Cost(start, compute, moved / _MEMORY_BYTES_PER_US, round(waves))


def halves(p: GroupedProblem, c: GemmConfig) -> bool:
    """Whether the last tiles are cut in two where that fills the SMs: those whose columns take two passes."""
    return not p.inner and passes(p.gemm, c) == 2


def _waves(even: float, cut: bool) -> float:
    """Of so many tiles for each SM. `cut`: in two, the last ones."""
    if even > _MANY_WAVES:
        return even + (_HALF / 2 if cut else 0.5)
    return math.floor(even) + _HALF if cut and 0 < even % 1 <= 0.5 else math.ceil(even)


def choose_grouped(p: GroupedProblem, chip: Chip) -> GemmConfig:
    """The configuration that was measured for this problem (tuning.py), or else the model's.

    Raises:
      ValueError: more groups than the kernel's table holds.
    """
    return tuned(p, chip) or cheapest_grouped(p, chip)


@lru_cache(maxsize=4096)
def cheapest_grouped(p: GroupedProblem, chip: Chip) -> GemmConfig:
    """The cheapest configuration by the model; the first of equals.

    Raises:
      ValueError: more groups than the kernel's table holds.
    """
    fitting = list(grouped_candidates(p, chip))
    if not fitting:
        rules = "; ".join(problems_with_grouped(p, GemmConfig(128, 128, 4)))
        raise ValueError(f"{p}: no configuration fits: {rules}.")
    return min(fitting, key=lambda c: grouped_cost(p, c, chip).total)


_TEXT = """\
#include <jax_deepgemm/gemm_grouped.cuh>

{mma}
{config}
struct GroupedConfig : Config {{
  static constexpr jdg::Grouping GROUPING = jdg::Grouping::{grouping};
  static constexpr bool SEGMENTED = {segmented}, ZERO_ROWS = {zero_rows};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({parameters}) {{
  const jdg::Operands operands = {{{operands}}};
  const jdg::Groups groups = {{sizes, {offset}, total, here, weights, extent}};
  const jdg::Problem problem = {{m, n, 1, 0, stripe}};
  jdg::gemm_grouped<GroupedConfig>(operands, groups, problem, {d_map}, d, {c});
}}
"""

_INTEGERS = (
    "m",
    "n",
    "k_blocks",
    "stripe",
    "total",
    "here",
    "weights",
    "extent",
)


def _has_offset(p: GroupedProblem) -> bool:
    return p.grouping in (ROWS, INNER)


def grouped_name(p: GroupedProblem, c: GemmConfig) -> str:
    """The name that profilers show."""
    base = kernel_name(p.gemm, c).removeprefix("jdg_sm90_")
    parts = ["jdg_sm90", _SHORT[p.grouping], base, f"g{p.capacity}"]
    parts += ["seg"] if p.segmented else []
    parts += ["zero"] if p.zero_rows else []
    return "_".join(parts)


def grouped_source(p: GroupedProblem, c: GemmConfig) -> KernelSource:
    """The source of the kernel that runs `c` on `p`."""
    a, b = sides(p.gemm)
    masked = p.grouping in (MASKED_ROWS, MASKED_INNER)
    batched_a, batched_b = int(masked), int(masked or p.grouping == ROWS)
    operands = ["&a_map", "&b_map", a.scale_map, b.scale_map, "k_blocks"]
    operands += [str(flag) for flag in (batched_a, batched_b, batched_a, batched_b)]
    parameters = [*leading_parameters(p.gemm, c), "const int* sizes"]
    parameters += ["const int* offset"] if _has_offset(p) else []
    name = grouped_name(p, c)
    text = _TEXT.format(
        mma=product(p.gemm, c, a, b),
        config=config_text(p.gemm, c, a, b, mask_k=p.inner, halves=halves(p, c)),
        grouping=_ENUM[p.grouping],
        segmented=as_cpp(p.segmented),
        zero_rows=as_cpp(p.zero_rows),
        threads=c.threads,
        name=name,
        parameters=", ".join([*parameters, *(f"int {x}" for x in _INTEGERS)]),
        operands=", ".join(operands),
        offset="offset" if _has_offset(p) else "nullptr",
        d_map="&d_map" if tma_store(p.gemm, c) else "nullptr",
        c="c" if reads_c(p.gemm) else f"static_cast<const {out_type(p.gemm)}*>(nullptr)",
    )
    return KernelSource(name, text, described(p, c), shared_memory=shared_memory(p.gemm, c).total)


def grouped_plan(
    p: GroupedProblem,
    c: GemmConfig,
    chip: Chip,
    x: GemmOperands,
    sizes: Operand,
    offset: Operand | None,
) -> LaunchPlan:
    """One launch that computes `p` with `c`.

    Raises:
      ValueError: the configuration breaks a rule for this problem.
    """
    broken = problems_with_grouped(p, c)
    if broken:
        rules = "; ".join(broken)
        raise ValueError(f"config {c} cannot run {p}: {rules}. Leave config=None to have one chosen.")
    lead = () if p.grouping == ROWS else (p.groups,)
    maps = tensor_maps(p.gemm, c, x, (*lead, p.m, p.n))
    groups = [sizes, *([offset] if _has_offset(p) and offset is not None else [])]
    integers = {
        "m": p.m,
        "n": p.n,
        "k_blocks": ceil_div(p.k, p.gemm.block_k),
        "stripe": stripe_height(p.gemm, c, chip),
        "total": p.segments,
        "here": p.groups,
        "weights": p.weights,
        "extent": p.k if p.inner else p.m,
    }
    scalars = (Scalar(integers[name], "int32") for name in _INTEGERS)
    most_rows = ceil_div(p.rows_bound, c.block_m) + (p.segments + 1 if p.grouping == ROWS else p.groups)
    most_tiles = most_rows * ceil_div(p.n, c.block_n) * (2 if halves(p, c) else 1)
    launch = Launch(
        kernel=compile_kernel(grouped_source(p, c), arch=chip.arch),
        grid=(min(most_tiles, chip.num_sms), 1, 1),
        block=c.threads,
        params=(*maps, *pointers(p.gemm, x), *groups, *scalars),
        shared_memory=shared_memory(p.gemm, c).total,
    )
    return LaunchPlan((*copy_of_c(p.gemm, x.c, p.groups), launch), label=str(p))
