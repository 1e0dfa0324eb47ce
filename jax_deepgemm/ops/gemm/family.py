"""The family of dense GEMMs."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config

__all__ = ["FAMILY", "GemmConfig", "GemmProblem", "Sm90Config"]

FAMILY = Family("gemm", GemmProblem, {"9.0a": "jax_deepgemm.ops.gemm.sm90.kernels"})
