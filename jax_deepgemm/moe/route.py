"""The router, as layers of experts use it (ops/route)."""

from __future__ import annotations

from jax_deepgemm.ops.route.api import DEEPSEEK_V3, route

__all__ = ["DEEPSEEK_V3", "route"]
