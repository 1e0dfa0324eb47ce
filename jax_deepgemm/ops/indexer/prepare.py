"""Operands as the kernel reads them: batches of vmap one behind the other, rows of whole 16 bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.indexer.fp4 import expand
from jax_deepgemm.ops.indexer.reference import windows

FEW_ROWS = 256
"""Tokens times heads that a block of threads or two have: so often a kernel would expand each key in FP4."""
_OWN_RANKS = {True: (3, 2, 1, 2, 1, 1), False: (3, 2, 2, 1, 1)}
"""Of operands, keys with and without scales."""


def prepare(scaled: bool, *arrays: jax.Array, **_: Any) -> list[jax.Array]:
    """Tokens of all batches in one row of tokens, and so the keys, if batches have their own: windows then
    begin where those of their batch do."""
    ranks = _OWN_RANKS[scaled]
    batch = next((x.shape[0] for x, rank in zip(arrays, ranks, strict=True) if x.ndim > rank), None)
    if batch is not None:
        arrays = tuple(_merged(scaled, batch, *arrays))
    *others, weights, start, end = arrays
    short = -weights.shape[-1] % 4  # TMA needs rows of whole 16 bytes
    return [*others, jnp.pad(weights, ((0, 0), (0, short))) if short else weights, start, end]


def prepare_packed(*arrays: jax.Array, **options: Any) -> list[jax.Array]:
    """The same of keys in FP4. For many tokens they are expanded once, before; for a few by the kernel."""
    q, keys, words, *rest = prepare(True, *arrays, **options)
    if q.shape[0] * q.shape[1] > FEW_ROWS:
        return [q, *expand(keys, words), *rest]
    return [q, keys, words, *rest]


def prepare_paged(*arrays: jax.Array, **_: Any) -> list[jax.Array]:
    """Tokens of all requests in one row of tokens."""
    q, *cache, weights, start, end, tables = arrays
    short = -weights.shape[-1] % 4
    weights = jnp.pad(weights.reshape(-1, weights.shape[-1]), ((0, 0), (0, short)))
    return [q.reshape(-1, *q.shape[2:]), *cache, weights, start.reshape(-1), end.reshape(-1), tables]


def there(whose: jax.Array, tables: jax.Array) -> jax.Array:
    """Which tokens are of a request that exists."""
    return (whose >= 0) & (whose < tables.shape[0])


def prepare_tokens(*arrays: jax.Array, **options: Any) -> list[jax.Array]:
    """The same of tokens of requests: those of nobody see nothing, so that no table is read for them."""
    *others, end, tables, whose = arrays
    seen = jnp.where(there(whose, tables)[:, None], end, 0)
    return [*prepare_paged(*others, seen, tables, **options), whose]


def _merged(scaled: bool, batch: int, *arrays: jax.Array) -> list[jax.Array]:
    ranks = _OWN_RANKS[scaled]
    keys = slice(1, 3 if scaled else 2)
    own_keys = any(x.ndim > rank for x, rank in zip(arrays[keys], ranks[keys], strict=True))
    each = arrays[1].shape[-2]
    merged = []
    for i, (x, rank) in enumerate(zip(arrays, ranks, strict=True)):
        if i in range(*keys.indices(len(arrays))) and not own_keys:
            merged.append(x)
            continue
        whole = x if x.ndim > rank else jnp.broadcast_to(x, (batch, *x.shape))
        if i >= len(arrays) - 2 and own_keys:
            merged.append(whole)
        else:
            merged.append(whole.reshape(-1, *whole.shape[2:]))
    if own_keys:
        offset = each * jnp.arange(batch, dtype=jnp.int32)[:, None]
        merged[-2:] = [(x + offset).reshape(-1) for x in windows(merged[-2], merged[-1], each)]
    return merged
