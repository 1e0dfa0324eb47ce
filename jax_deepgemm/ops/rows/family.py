"""The family of kernels that move rows."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.rows.problem import RowsProblem

FAMILY = Family("rows", RowsProblem, {"9.0a": "jax_deepgemm.ops.rows.sm90"})
