"""The family of kernels that normalise rows; any GPU since Ampere runs them."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.norm.problem import NormProblem

FAMILY = Family("norm", NormProblem, {"8.0": "jax_deepgemm.ops.norm.kernels"})
