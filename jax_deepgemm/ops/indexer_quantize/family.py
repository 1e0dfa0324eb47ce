"""The family of kernels that quantise an indexer's rows."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.indexer_quantize.problem import RotateProblem

FAMILY = Family("indexer_quantize", RotateProblem, {"9.0a": "jax_deepgemm.ops.indexer_quantize.sm90"})
