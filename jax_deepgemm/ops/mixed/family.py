"""The family of mixed-input products."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.mixed.problem import MixedProblem

__all__ = ["FAMILY", "MixedProblem"]

FAMILY = Family("mixed", MixedProblem, {"9.0a": "jax_deepgemm.ops.mixed.sm90.kernels"})
"""What a mixed-input product is to compute, as its kernels see it."""
