"""The family of grouped GEMMs."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.grouped.problem import GroupedProblem

FAMILY = Family("grouped", GroupedProblem, {"9.0a": "jax_deepgemm.ops.grouped.sm90.kernels"})
