"""Norms of rows and of sums, in their type and in FP8."""

from __future__ import annotations

from jax_deepgemm.ops.norm.op import norm_rows

__all__ = ["norm_rows"]
