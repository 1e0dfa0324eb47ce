"""The dense GEMM kernels of compute capability 9.0."""

from __future__ import annotations

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, problems_with, shared_memory
from jax_deepgemm.ops.gemm.sm90.cost import candidates, cost
from jax_deepgemm.ops.gemm.sm90.plan import gemm_plan
from jax_deepgemm.ops.gemm.sm90.source import kernel_source


def _broken_rules(p: GemmProblem, c: Sm90Config, chip: Chip) -> list[str]:
    return problems_with(p, c)


KERNELS = Kernels[GemmProblem, Sm90Config](
    config=Sm90Config,
    candidates=candidates,
    cost=cost,
    broken_rules=_broken_rules,
    shared_bytes=lambda p, c: shared_memory(p, c).total,
    sources=lambda p, c: [kernel_source(p, c)],
    plan=gemm_plan,
)
