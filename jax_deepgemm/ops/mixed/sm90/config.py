"""Configurations of the kernels of mixed-input products on SM90, and the rules that they must obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.problem import align_up, ceil_div
from jax_deepgemm.ops.mixed.problem import MixedProblem

TOKEN_ROW_BYTES = 128  # of k in a slot
PRODUCER_REGISTERS = 40


SLAB_STAGES, SCALE_STAGES = 4, 2
"""Of staged kernels: slots of slabs, and of quads of scales."""
SLAB_ROW_BYTES, SLAB_ROWS, STAGING_SLABS = 128, 8, 4
STAGING_BYTES = 8 * STAGING_SLABS * SLAB_ROWS * SLAB_ROW_BYTES
"""Of D, as its epilogue stages it: of each consumer warp so many slabs of 8 rows of 128 bytes."""


class StagedRegisters(NamedTuple):
    """Of a thread of each warpgroup; 512 for the four of them."""

    consumer: int = 208
    producer: int = 40
    expander: int = 56


STAGED_REGISTERS = StagedRegisters()
_MAX_SEGMENTS, _MAX_N = 2048, 1 << 22  # see ops/grouped/sm90/rules.py
_MANY_TOKENS = 96


@dataclass(frozen=True)
class MixedConfig:
    """How a mixed-input product is cut on SM90.

    Attributes:
      tokens: rows of D in a tile, the width of the instruction unless it is staged.
      across: warpgroups side by side, of 64 rows (FP4) or 128 of the weight each; staged: 64 rows.
      deep: warpgroups that take the blocks of k of a tile in turn.
      stages: slots of the shared-memory ring; one holds a block of k of a tile.
      split_k: blocks of a cluster that share a tile's k (dense products).
      blocks_per_sm: blocks of threads resident on one SM.
      staged: whether a warpgroup of its own expands FP4 weights into shared memory, for two that multiply
        them with tokens on the instruction's 64-row side: tiles of 256 tokens by 128 rows of the weight, of
        whose tokens only as many parts of 64 are multiplied as a group has.
    """

    tokens: int
    across: int
    deep: int
    stages: int
    split_k: int = 1
    blocks_per_sm: int = 1
    staged: bool = False

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return 2 if self.staged else self.across * self.deep

    @property
    def shares_registers(self) -> bool:
        """Whether consumers take registers from a whole warpgroup of the producer (setmaxnreg)."""
        return self.warpgroups == 2 and self.blocks_per_sm == 1 and self.tokens > _MANY_TOKENS

    @property
    def threads(self) -> int:
        """With the producer's warp, or warpgroup, and the expander."""
        if self.staged:
            return 512
        return 128 * self.warpgroups + (128 if self.shares_registers else 32)

    @property
    def registers(self) -> int:
        """What a consumer thread may use: each of an SM's four sub-partitions has its own register file."""
        if self.staged:
            return STAGED_REGISTERS.consumer
        if self.shares_registers:
            return 232
        warps = self.blocks_per_sm * ceil_div(self.threads, 32)
        return min(248, 16384 // (32 * ceil_div(warps, 4)) // 8 * 8)

    def __str__(self) -> str:
        split = f" split_k={self.split_k}" if self.split_k > 1 else ""
        shared = f" {self.deep} deep" if self.deep > 1 else ""
        tile = f"{self.tokens} tokens x {self.across}{shared}{' staged' if self.staged else ''}"
        return f"{tile} stages={self.stages}{split} blocks/SM={self.blocks_per_sm}"


def height(p: MixedProblem, c: MixedConfig) -> int:
    """Rows of the weight in a tile."""
    return p.height * c.across


def _staged_bytes(p: MixedProblem, c: MixedConfig) -> int:
    slot = (c.tokens + height(p, c)) * TOKEN_ROW_BYTES + 32
    scales = SCALE_STAGES * (16 * (c.tokens + 8) + 32) + 16 * (c.stages + 1)
    slabs = SLAB_STAGES * (c.across * p.part_bytes + 32)
    return align_up(c.stages * slot + STAGING_BYTES + scales + slabs + p.table_bytes, 128)


def shared_memory(p: MixedProblem, c: MixedConfig) -> int:
    """Bytes of shared memory of a configuration; mirrors `MixedLayout` in config.cuh, or `StagedLayout` in
    staged.cuh, which assert it."""
    if c.staged:
        return _staged_bytes(p, c)
    scales = c.tokens * 4 if p.scaled_tokens else 0
    slot = c.tokens * p.token_bytes + c.across * p.part_bytes + scales + 2 * 8 + 16
    sums = (c.deep - 1 + c.split_k - 1) * c.tokens * height(p, c) * 4
    return align_up(c.stages * slot + c.deep * scales + sums + 16 + p.table_bytes, 128)


_FIXED_REGISTERS = 64  # two fragments of a weight, and what the loop needs beside its accumulators


def broken_rules(p: MixedProblem, c: MixedConfig, chip: Chip) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    if c.staged:
        return _broken_rules_of_staged(p, c, chip)
    rules = [
        (c.tokens % 8 == 0 and 8 <= c.tokens <= 160, f"tokens is {c.tokens}, must be 8 to 160 in eights"),
        (c.across in (1, 2, 4), f"across is {c.across}, must be 1, 2 or 4"),
        (c.deep in (1, 2, 4), f"deep is {c.deep}, must be 1, 2 or 4"),
        (c.warpgroups <= 4, f"{c.warpgroups} warpgroups, at most 4"),
        (c.split_k in (1, 2, 4, 8), f"split_k is {c.split_k}, must be 1, 2, 4 or 8"),
        (c.split_k == 1 or p.dense, "split_k is for products without groups"),
        (c.split_k <= p.k_blocks, f"split_k is {c.split_k}, more than the blocks of k"),
        (
            c.stages % c.deep == 0 and c.stages >= 2,
            f"stages is {c.stages}, must be a multiple of deep, and 2",
        ),
        (c.blocks_per_sm in (1, 2), f"blocks_per_sm is {c.blocks_per_sm}, must be 1 or 2"),
    ]
    broken = [message for holds, message in rules if not holds]
    if not broken and c.tokens + _FIXED_REGISTERS > c.registers:
        broken = [f"{c.tokens} tokens do not fit in {c.registers} registers"]
    return broken


def _broken_rules_of_staged(p: MixedProblem, c: MixedConfig, chip: Chip) -> list[str]:
    tile = (c.tokens, c.across)
    rules = [
        (p.scaled_tokens, f"staged is for tokens of float8_e4m3fn and FP4 weights, not {p}"),
        (tile == (256, 2), f"staged tiles have 256 tokens and across 2, not {c.tokens} and {c.across}"),
        (
            (c.deep, c.split_k, c.blocks_per_sm) == (1, 1, 1),
            "staged goes with deep, split_k and blocks_per_sm of 1",
        ),
        (c.stages >= 2, f"stages is {c.stages}, must be 2 or more"),
        (shared_memory(p, c) <= chip.smem_per_block, f"{c.stages} stages do not fit in shared memory"),
    ]
    return [message for holds, message in rules if not holds]


def refusal(p: MixedProblem) -> str:
    if p.held > _MAX_SEGMENTS:
        return f"{p.held} groups, the kernel's table has room for {_MAX_SEGMENTS}; take them in parts"
    return f"n is {p.n}, a tile's record has room for {_MAX_N}" if p.n > _MAX_N else ""
