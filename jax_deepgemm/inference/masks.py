"""What DeepSpeed's masks, ALiBi tensors and flags say of scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.inference import checks
from jax_deepgemm.inference.names import Given, there

MASKED = -9984.0
"""-10000, as DeepSpeed's masks have for what is hidden, in bfloat16. Such numbers and smaller ones hide."""


def mask_bias(name: str, given: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """An additive mask for scores [batch, heads, queries, keys], or [batch, queries, keys]."""
    if not there(given):
        return None
    mask = checks.floats(name, "attn_mask", given)
    if mask.ndim == 2:
        mask = jnp.expand_dims(mask, tuple(range(1, len(shape) - 1)))
    elif mask.ndim == 3 and len(shape) == 4:
        mask = mask[:, None]
    mask = checks.fitted(name, "attn_mask", mask, shape, "the scores")
    wide = mask.astype(jnp.float32)
    return jnp.where(wide <= MASKED, -jnp.inf, wide)


def alibi_bias(
    name: str, given: Any, shape: tuple[int, ...], offset: int = 0, parts: int = 1
) -> jax.Array | None:
    """What ALiBi adds to each key, from [batch * all heads, 1, keys]."""
    if not there(given):
        return None
    batch, heads, _, keys = shape
    rows = (batch * heads * parts, 1, keys)
    alibi = checks.floats(name, "alibi", given)
    checks.shaped(name, "alibi", alibi, rows, "[batch * heads, 1, keys]")
    own = alibi.reshape(batch, heads * parts, 1, keys)[:, offset : offset + heads]
    return own.astype(jnp.float32)


def view_of(given: Given, queries: int, keys: int, triangular: bool) -> dict[str, Any]:
    """What queries see: the keys up to their own row, or, without that, they are the last ones."""
    window = int(given.window_size) if given.local_attention else None
    if not triangular and window is None:
        return {}
    return {"causal": True, "q_offset": 0 if triangular else keys - queries, "window": window}
