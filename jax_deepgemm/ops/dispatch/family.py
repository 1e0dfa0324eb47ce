"""The family of kernels that sort copies of tokens by expert."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.dispatch.problem import DispatchProblem

FAMILY = Family("dispatch", DispatchProblem, {"9.0a": "jax_deepgemm.ops.dispatch.sm90"})
