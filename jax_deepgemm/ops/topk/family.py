"""The family of kernels that find the largest numbers of rows."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.topk.problem import TopkProblem

FAMILY = Family("topk", TopkProblem, {"9.0a": "jax_deepgemm.ops.topk.sm90"})
