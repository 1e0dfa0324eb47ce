"""Configurations of the SM90 GEMM kernels: pure data, and the rules that they must obey.

Three kernels share one main loop (include/jax_deepgemm/gemm/mainloop.cuh):

- `gemm/gemm.cuh`: A's rows on wgmma's 64-row side, a persistent grid; block_m = 64, 128, 192 or 256, block_n
  any multiple of 8.
- `gemm/gemm_small_m.cuh` (`swap_ab`, or `split_k` > 1), for few tokens: a cluster of blocks of threads
  computes one tile and shares its k; 64 or 128 rows, 8 .. 128 columns. With `swap_ab` B's rows (weights) lie
  on the 64-row side, tokens on the narrow side.
- `grouped/gemm_grouped.cuh`: as the first, for groups whose sizes are on the device (ops/grouped).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem, align_up, ceil_div

_SLOT_ROW_BYTES = 128  # bytes of k in one slot of the ring: 128 FP8 or 64 BF16 elements
_QUAD = 4  # blocks of k whose scales travel together
SLAB_ROWS, SLAB_ROW_BYTES = 8, 128  # a piece of D on its way to TMA
_MAX_SLABS = 8  # enough to drain behind the next tile; more would cost slots of the ring
_RESERVED_BYTES = 1024  # what the system takes of an SM's shared memory for each resident block
_MAX_STAGES = 16


@dataclass(frozen=True)
class Sm90Config(GemmConfig):
    """How a GEMM is cut on SM90.

    Attributes:
      block_m, block_n: tile of D that one block of threads computes at a time.
      stages: slots of the shared-memory ring; one slot holds 128 bytes of k of both operands.
      swap_ab: whether B's rows lie on wgmma's 64-row side (for few tokens).
      split_k: blocks of a cluster that share the k range of a tile.
      blocks_per_sm: blocks of threads resident on one SM (2 only with swap_ab or split_k).
      slabs: buffers of 8 rows of 128 bytes of D, for each consumer warp, that may drain to memory at once; 0
        without TMA stores.
      ping_pong: whether each of two warpgroups has whole tiles of 128 rows, in turn, so that one multiplies
        while the other stores (BF16 only).
      gated: whether the columns of a tile are those of gate and of up of the same features, 128 each, of
        which the kernel writes what they become together (m-grouped products, of gate and up in halves).
    """

    block_m: int
    block_n: int
    stages: int
    swap_ab: bool = False
    split_k: int = 1
    blocks_per_sm: int = 1
    slabs: int = 0
    ping_pong: bool = False
    gated: bool = False

    @property
    def one_tile(self) -> bool:
        """Whether a block of threads, or a cluster, computes one tile; otherwise the grid is persistent."""
        return self.swap_ab or self.split_k > 1

    @property
    def rows(self) -> int:
        """Extent on wgmma's 64-row side."""
        return self.block_n if self.swap_ab else self.block_m

    @property
    def cols(self) -> int:
        """Extent on wgmma's other side."""
        return self.block_m if self.swap_ab else self.block_n

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups, of 64 rows each; of 256 rows, two have 128 each."""
        return 2 if self.rows == 256 else self.rows // 64 * self.across

    @property
    def across(self) -> int:
        """Warpgroups side by side: of few rows, two have half of the columns each, but not gate and up."""
        return 2 if self.rows == 64 and self.cols % 128 == 0 and not (self.one_tile or self.gated) else 1

    @property
    def threads(self) -> int:
        """The producer is one warp, but a whole warpgroup where it gives registers to several consumers."""
        return 128 * self.warpgroups + (128 if self.shares_registers else 32)

    @property
    def shares_registers(self) -> bool:
        """Whether warpgroups take and give registers (setmaxnreg)."""
        return not self.one_tile and self.warpgroups > 1

    @property
    def registers(self) -> int:
        """What a consumer thread may use: each of an SM's four sub-partitions has its own register file."""
        if self.shares_registers:
            return {2: 232, 3: 160}[self.warpgroups]  # by setmaxnreg
        warps = self.blocks_per_sm * ceil_div(self.threads, 32)
        return min(248, 16384 // (32 * ceil_div(warps, 4)) // 8 * 8)

    @property
    def producer_registers(self) -> int:
        """What is left for the producer's warpgroup: setmaxnreg shares out 512 a lane over all warpgroups."""
        return {1: 0, 2: 40, 3: 32}[self.warpgroups]

    def __str__(self) -> str:
        tile = f"{'swap-AB ' if self.swap_ab else ''}{self.block_m}x{self.block_n}"
        split = f" split_k={self.split_k}" if self.split_k > 1 else ""
        turns, gated = " ping-pong" if self.ping_pong else "", " gated" if self.gated else ""
        return f"{tile} stages={self.stages}{split} blocks/SM={self.blocks_per_sm}{turns}{gated}"


GemmConfig.DEFAULT = Sm90Config


@dataclass(frozen=True)
class SharedMemory:
    """Bytes of shared memory of a configuration; mirrors `Layout` in ring.cuh, which asserts it."""

    slot: int
    scale_slot: int
    staging: int
    stages: int
    scale_step: int = _QUAD
    table: int = 0
    turn: int = 0

    @property
    def scale_slots(self) -> int:
        return ceil_div(self.stages, self.scale_step) + 1

    @cached_property
    def total(self) -> int:
        ring = self.stages * (self.slot + 2 * 8 + 16)
        rest = self.scale_slots * self.scale_slot + self.staging + self.table + self.turn
        return align_up(ring + rest, 128)


def stored_columns(p: GemmProblem, c: Sm90Config) -> int:
    """Columns of D that a warpgroup stores together."""
    return c.cols // c.across // cuts(p, c) // p.finish.halves


def cuts(p: GemmProblem, c: Sm90Config) -> int:
    """In how many parts a warpgroup's columns become something else and are stored (gemm.cuh)."""
    if not p.finish.changes or c.one_tile or c.gated:
        return 1
    return 4 if p.is_fp8 and c.cols // c.across == 256 else 3 if c.ping_pong and c.cols == 192 else 1


def tma_store(p: GemmProblem, c: Sm90Config) -> bool:
    """Whether D leaves through TMA: from the persistent kernel, if its rows are 16-byte aligned."""
    width = SLAB_ROW_BYTES // p.out_bytes
    if p.finish.quantized:
        return False
    aligned = p.columns * p.out_bytes % 16 == 0
    return not (c.one_tile or p.swiglu) and aligned and stored_columns(p, c) >= width


def passes(p: GemmProblem, c: Sm90Config) -> int:
    """In how many products, one after the other, the columns of a tile are multiplied.

    An FP8 accumulator needs a product beside it; in two passes a 128x256 tile has registers for both.
    """
    return 2 if p.is_fp8 and not p.fine and c.cols // c.across == 256 else 1


def shared_memory(p: GemmProblem, c: Sm90Config) -> SharedMemory:
    rows_k_major, cols_k_major = (p.b_k_major, p.a_k_major) if c.swap_ab else (p.a_k_major, p.b_k_major)
    vectors = (p.is_fp8, p.b_scales in ("vector", "slices", "vector_32"))
    row_vector, col_vector = reversed(vectors) if c.swap_ab else vectors
    step = 1 if p.b_scales == "slices" or p.fine else _QUAD
    width = 4 * (1 if p.b_scales == "slices" else _QUAD)  # bytes of a row's scales
    rows = c.rows if rows_k_major else align_up(c.rows, 64)
    cols = c.cols if cols_k_major else align_up(c.cols, 64)
    scale_slot = (c.rows if row_vector else 0) * width
    scale_slot += align_up(c.cols * width, 128) if col_vector else 0
    if p.square_scales or p.b_scales == "block_32":
        scale_slot += align_up(scale_blocks(p, c) * width, 128)
    staging = 4 * c.warpgroups * c.slabs * SLAB_ROWS * SLAB_ROW_BYTES
    if c.split_k > 1:  # what the ranks of a cluster send each other, and its barrier
        staging = align_up(_partial_bytes(c) + 16, 128)
    slot, turn = (rows + cols) * _SLOT_ROW_BYTES, 32 if c.ping_pong else 0
    return SharedMemory(slot, scale_slot, staging, c.stages, step, p.table_bytes, turn)


def _partial_bytes(c: Sm90Config) -> int:
    """Bytes of a float32 tile [row][token], as `Slices` in gemm_small_m.cuh has it."""
    return c.rows * (c.cols + 4) * 4


def scale_blocks(p: GemmProblem, c: Sm90Config) -> int:
    """How many scales of 128 rows of B a tile loads: of as many blocks as it can touch, as tiles start at
    multiples of their width; stored side by side, of whole 16 bytes. Of 32 rows: those of whole blocks."""
    if p.fine:
        return c.block_n // 32
    if p.slices:
        return _QUAD
    return ceil_div(128 - math.gcd(c.block_n, 128) + c.block_n, 128)


def fit_stages(p: GemmProblem, c: Sm90Config, chip: Chip, limit: int = _MAX_STAGES) -> Sm90Config | None:
    """The configuration with as many stages as shared memory holds, or None if that is fewer than three."""
    capacity = chip.smem_per_block
    if c.blocks_per_sm > 1:
        capacity = (chip.smem_per_block + _RESERVED_BYTES) // c.blocks_per_sm - _RESERVED_BYTES
    if not c.one_tile and p.is_fp8 and (c.rows == 192 or p.b_scales == "vector"):
        limit = 4  # measured: further slots cost more in addresses than they hide
    # Draining D at leisure is worth a slot of the ring, but not the fourth, nor in ping-pong the fifth.
    for enough in (5, 4, 3) if c.ping_pong else (4, 3):
        for slabs in _slab_choices(p, c):
            for stages in range(limit, enough - 1, -1):
                fitted = replace(c, stages=stages, slabs=slabs)
                if shared_memory(p, fitted).total <= capacity and not problems_with(p, fitted):
                    return fitted
    return None


def _slab_choices(p: GemmProblem, c: Sm90Config) -> list[int]:
    if p.swiglu:
        return [2]  # of 8 rows of 128 features in FP8, stored by the warp itself
    if p.finish.quantized:
        return [2] if not c.one_tile else [0]  # the same
    if not tma_store(p, c):
        return [0]
    whole = stored_columns(p, c) * p.out_bytes // SLAB_ROW_BYTES * (16 // SLAB_ROWS)  # of a warp's 16 rows
    return [n for n in range(min(whole, _MAX_SLABS), 0, -2) if whole % n == 0]


def problems_with(p: GemmProblem, c: Sm90Config) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    rows, cols = c.rows, c.cols
    resident = (1, 2) if c.one_tile else (1,)
    takes_turns = not p.is_fp8 and rows == 128 and not c.one_tile
    *some, highest = (64, 128, 192, 256) if p.is_fp8 else (64, 128, 192)
    heights = f"{', '.join(map(str, some))} or {highest}"
    width_is_legal = cols % 8 == 0 and 8 <= cols <= 256
    few = "swap_ab or split_k"
    rules = [
        (rows in (*some, highest), f"the 64-row side is {rows}, must be {heights}"),
        (not c.one_tile or rows <= 128, f"the 64-row side is {rows}, must be 64 or 128 with {few}"),
        (width_is_legal, f"the other side is {cols}, must be 8 to 256 in steps of 8 (wgmma)"),
        (c.blocks_per_sm in resident, f"blocks_per_sm is {c.blocks_per_sm}, must be 1, or 2 with {few}"),
        (c.split_k in (1, 2, 4, 8), f"split_k is {c.split_k}, must be 1, 2, 4 or 8 (portable cluster size)"),
        (cols <= _widest(p, c), f"{cols} columns leave no registers for two accumulators"),
        (
            p.b_scales != "block_slices" or cols in (128, 256),
            f"the other side is {cols}, must be 128 or 256 where scales of 128x128 lie side by side",
        ),
        (
            p.b_scales != "block_32" or c.block_n % 32 == 0,
            f"block_n is {c.block_n}, must be a multiple of 32 where scales of B are of 32x32",
        ),
        (c.split_k <= ceil_div(p.k_blocks, _QUAD), f"split_k is {c.split_k}, more than the quads of k"),
        (c.slabs in _slab_choices(p, c), f"slabs is {c.slabs}, must be one of {_slab_choices(p, c)}"),
        (
            takes_turns or not c.ping_pong,
            f"ping_pong is for BF16 operands and 128 rows, without {few}",
        ),
        (c.gated == p.gated, "gated is for products of which gate and up meet, and for all of them"),
        (
            not c.gated or (rows in (64, 128) and cols == 256 and not (c.one_tile or c.ping_pong)),
            f"gated tiles are 64x256 or 128x256, not {rows}x{cols}",
        ),
        (
            p.finish.heads is None or c.one_tile or cols // c.across % 64 == 0,
            f"a warpgroup has {cols // c.across} columns, must be a multiple of 64 where D has holes",
        ),
        (
            not p.finish.quantized or (not c.one_tile and stored_columns(p, c) == 128),
            "a warpgroup of the persistent kernel must store 128 columns together where D is quantised",
        ),
        (
            p.finish.halves == 1 or c.one_tile or cols // c.across % 16 == 0,
            f"a warpgroup has {cols // c.across} columns, must be a multiple of 16 where pairs become one",
        ),
        (c.stages >= 2, f"stages is {c.stages}, must be at least 2"),
    ]
    if c.one_tile:
        ring = c.stages * (rows + cols) * _SLOT_ROW_BYTES
        fits = c.split_k > 1 or _partial_bytes(c) <= ring
        rules.append((fits, "the float32 partial tile does not fit over the ring"))
    return [message for holds, message in rules if not holds]


def _widest(p: GemmProblem, c: Sm90Config) -> int:
    """Widest tile that is allowed; all candidates fit in registers, others may spill."""
    if c.one_tile:
        return 64 if c.blocks_per_sm * c.warpgroups > 2 else 128
    if p.fine:
        changed = 0 if c.rows > 128 else 64  # beside the next tile's first products
        return c.across * (changed if p.finish.changes else 128)
    if not p.is_fp8:
        if c.ping_pong:
            return 128 if p.add_c and not p.reduces else 160 if p.finish.changes and c.cols < 192 else 192
        return 176 if p.add_c and (p.n % 2 or p.finish.changes) else 256
    if c.gated and p.finish.changes:
        return 128 if p.out == "float32" and c.rows == 128 else 256
    if p.finish.changes and not (c.cols == 256 and p.out == "bfloat16" and not p.add_c):
        return _widest_changed(p, c)
    if c.across == 2:
        return 256
    if c.rows == 256:  # two parts of 64 rows to a warpgroup, and one product beside them
        return 128
    return 256 if p.square_scales and c.rows <= 128 and passes(p, c) == 2 else 192


def _widest_changed(p: GemmProblem, c: Sm90Config) -> int:
    """The same where sums become something else beside the next tile's first product."""
    if c.rows > 128:
        return 0
    late = p.add_c and not p.reduces
    if late and p.columns % 2:
        return 96
    return 256 if c.across == 2 else 128 if late or p.out == "float32" else 160
