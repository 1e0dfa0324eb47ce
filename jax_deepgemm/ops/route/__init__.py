"""Routing: which experts a token goes to, and how much each of them counts."""

from __future__ import annotations

from jax_deepgemm.ops.route.api import DEEPSEEK_V3, route

__all__ = ["DEEPSEEK_V3", "route"]
