"""The kernels of mixed-input products of compute capability 9.0."""

from __future__ import annotations

from jax_deepgemm.core.family import Kernels
from jax_deepgemm.ops.mixed.problem import MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import MixedConfig, broken_rules, refusal, shared_memory
from jax_deepgemm.ops.mixed.sm90.cost import candidates, cost
from jax_deepgemm.ops.mixed.sm90.plan import mixed_plan
from jax_deepgemm.ops.mixed.sm90.source import mixed_source

KERNELS = Kernels[MixedProblem, MixedConfig](
    config=MixedConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=broken_rules,
    refusal=refusal,
    shared_bytes=shared_memory,
    sources=lambda p, c: [mixed_source(p, c)],
    plan=mixed_plan,
)
