"""What DeepSpeed's masks, ALiBi tensors and flags say of scores [batch, heads, queries, keys]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.inference import checks
from jax_deepgemm.inference.names import Given, there

MASKED = -9984.0
"""-10000, as DeepSpeed's masks have for what is hidden, in bfloat16. Such numbers and smaller ones hide."""


def bias_of(
    name: str, mask: Any, alibi: Any, shape: tuple[int, ...], offset: int = 0, parts: int = 1
) -> jax.Array | None:
    """What is added to the scores, float32; None: nothing."""
    found = []
    if there(mask):
        found.append(_mask(name, checks.floats(name, "attn_mask", mask), shape))
    if there(alibi):
        found.append(_alibi(name, checks.floats(name, "alibi", alibi), shape, offset, parts))
    return sum(found[1:], found[0]) if found else None


def _mask(name: str, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [batch, keys], [batch, queries or 1, keys] or four dimensions."""
    if mask.ndim == 2:
        mask = mask[:, None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    wide = checks.fitted(name, "attn_mask", mask, shape, "the scores").astype(jnp.float32)
    return jnp.where(wide <= MASKED, -jnp.inf, wide)


def _alibi(name: str, alibi: jax.Array, shape: tuple[int, ...], offset: int, parts: int) -> jax.Array:
    """From [batch * all heads, 1, keys], of which these heads are a part."""
    batch, heads, _, keys = shape
    rows = (batch * heads * parts, 1, keys)
    alibi = checks.shaped(name, "alibi", alibi, rows, "[batch * heads, 1, keys]")
    own = alibi.reshape(batch, heads * parts, 1, keys)[:, offset : offset + heads]
    return own.astype(jnp.float32)


def view_of(given: Given, queries: int, keys: int, triangular: bool) -> dict[str, Any]:
    """What queries see: the keys up to their own row, or, without that, they are the last ones."""
    window = int(given.window_size) if given.local_attention else None
    if not triangular and window is None:
        return {}
    return {"causal": True, "q_offset": 0 if triangular else keys - queries, "window": window}
