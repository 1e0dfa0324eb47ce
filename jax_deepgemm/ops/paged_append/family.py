"""The family of kernels that append to a cache; any GPU since Ampere runs them."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.paged_append.problem import AppendProblem

FAMILY = Family("paged_append", AppendProblem, {"8.0": "jax_deepgemm.ops.paged_append.kernels"})
