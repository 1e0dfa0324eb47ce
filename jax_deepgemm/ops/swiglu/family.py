"""The family of kernels that compute activations. Those that quantise them too are of the family quantize."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.swiglu.problem import SwigluProblem

FAMILY = Family("swiglu", SwigluProblem, {"9.0a": "jax_deepgemm.ops.swiglu.sm90"})
