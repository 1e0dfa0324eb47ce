"""The grouped GEMM kernels of compute capability 9.0."""

from __future__ import annotations

from jax_deepgemm.core.family import Kernels
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, shared_memory
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates, grouped_cost
from jax_deepgemm.ops.grouped.sm90.plan import grouped_plan
from jax_deepgemm.ops.grouped.sm90.rules import broken_rules, refusal
from jax_deepgemm.ops.grouped.sm90.source import grouped_source

KERNELS = Kernels[GroupedProblem, Sm90Config](
    config=Sm90Config,
    candidates=grouped_candidates,
    cost=grouped_cost,
    broken_rules=broken_rules,
    refusal=refusal,
    shared_bytes=lambda p, c: shared_memory(p.gemm, c).total,
    sources=lambda p, c: [grouped_source(p, c)],
    plan=grouped_plan,
)
