"""The rules that a configuration of a grouped GEMM must obey."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.finish import AS_IT_IS
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, problems_with
from jax_deepgemm.ops.grouped.problem import INNER, MASKED_INNER, MASKED_ROWS, ROWS, GroupedProblem

_MAX_SEGMENTS = 2048  # a tile's record has 12 bits for its segment, ...
_MAX_N = 1 << 22  # ... and 19 for its column, in eights
_MOST_INDEXED = 128


def broken_rules(p: GroupedProblem, c: Sm90Config, chip: Chip) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    broken = ["swap_ab and split_k are for dense GEMMs"] if c.one_tile else []
    broken += [f"n is {p.n}, a tile's record has room for {_MAX_N}"] if p.n > _MAX_N else []
    return broken + (_index_rules(c) if p.by_index else []) + problems_with(p.gemm, c)


def _index_rules(c: Sm90Config) -> list[str]:
    """A warpgroup copies the rows (gemm/gather.cuh), and keeps in registers which ones they are."""
    few = f"{c.warpgroups} consumer warpgroup, must be 2 or more where an index names rows"
    many = f"block_m is {c.block_m}, must be at most {_MOST_INDEXED} where an index names rows"
    return [few] * (not c.shares_registers) + [many] * (c.block_m > _MOST_INDEXED)


def refusal(p: GroupedProblem) -> str:
    """Why no configuration can run a problem."""
    if p.held > _MAX_SEGMENTS:
        return _too_many(p)
    return next((what for what, given in _no_kernel(p).items() if given), "")


def _no_kernel(p: GroupedProblem) -> dict[str, bool]:
    """Problems that no op asks for and no kernel computes."""
    fp8, ends = p.gemm.is_fp8, p.finish != AS_IT_IS
    indexed = {"": (p.grouping,), "a": (ROWS,) if fp8 else (ROWS, INNER), "b": () if fp8 else (INNER,)}
    return {
        f"rows of {p.by_index} by an index, {p.grouping}": p.grouping not in indexed[p.by_index],
        "rows by an index in a chain of launches": p.by_index != "" and p.chained,
        "rows by an index with scales for 32 of k": p.by_index != "" and p.gemm.fine,
        "an epilogue of k in groups": ends and p.inner,
        "an epilogue and C": ends and p.add_c,
        f"gate and up in halves of {p.n} rows with scales": ends and p.gated and fp8 and p.n % 256 > 0,
    }


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
