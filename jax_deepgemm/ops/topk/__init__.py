"""The k largest numbers of every row, exactly."""

from __future__ import annotations

from jax_deepgemm.ops.topk.api import topk

__all__ = ["topk"]
