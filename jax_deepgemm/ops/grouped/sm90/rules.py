"""The rules that a configuration of a grouped GEMM must obey."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, problems_with
from jax_deepgemm.ops.grouped.problem import INNER, MASKED_INNER, MASKED_ROWS, ROWS, GroupedProblem

_MAX_SEGMENTS = 2048  # a tile's record has 12 bits for its segment, ...
_MAX_N = 1 << 22  # ... and 19 for its column, in eights


def broken_rules(p: GroupedProblem, c: Sm90Config, chip: Chip) -> list[str]:
    """Why a configuration cannot run a problem: one line for each rule that it breaks."""
    broken = ["swap_ab and split_k are for dense GEMMs"] if c.one_tile else []
    broken += [f"n is {p.n}, a tile's record has room for {_MAX_N}"] if p.n > _MAX_N else []
    broken += ["rows by an index need a warpgroup to load them: several consumers"] if _alone(p, c) else []
    return broken + problems_with(p.gemm, c)


def _alone(p: GroupedProblem, c: Sm90Config) -> bool:
    """Whether the producer is one warp, where a warpgroup copies rows (gemm/gather.cuh)."""
    return bool(p.by_index) and not c.shares_registers


def refusal(p: GroupedProblem) -> str:
    """Why no configuration can run a problem."""
    return _too_many(p) if p.held > _MAX_SEGMENTS else ""


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
