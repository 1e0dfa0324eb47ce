"""Projections of wide rows and the sums of their squares, for hyper-connections."""

from __future__ import annotations

from jax_deepgemm.ops.hc_prenorm.api import hc_prenorm_gemm

__all__ = ["hc_prenorm_gemm"]
