"""Calls for compute-sanitizer: parts of tokens, the last of them shorter, and both orders."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.indexer_topk.api import indexer_topk

FORMS = ((37, 700, 8, 64, 40, "index"), (21, 5001, 64, 128, 300, "value"))
"""Tokens, keys, heads, d, k, order."""


def cases() -> Iterator[Case]:
    """Yields each form, of 16 tokens at a time."""
    for tokens, keys, heads, depth, k, order in FORMS:
        rng = np.random.default_rng(tokens)
        q = jnp.asarray(rng.normal(size=(tokens, heads, depth)), jnp.float8_e4m3fn)
        kv = jnp.asarray(rng.normal(size=(keys, depth)), jnp.float8_e4m3fn)
        scales = jnp.asarray(rng.uniform(0.5, 2, keys), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(tokens, heads)), jnp.float32)
        bounds = [jnp.asarray(x, jnp.int32) for x in np.sort(rng.integers(0, keys + 1, (2, tokens)), axis=0)]
        run = functools.partial(_scores, k=k, order=order)
        yield Case(f"indexer_topk {k} of {tokens}x{keys}", run, (q, kv, scales, weights, *bounds))


def _scores(q: jax.Array, kv: jax.Array, scales: jax.Array, *rest: jax.Array, k: int, **options: Any) -> Any:
    weights, start, end = rest
    options |= {"values": True, "scratch_bytes": 1}
    found, chosen = indexer_topk(q, (kv, scales), weights, start, end, k, **options)
    return jnp.sort(jnp.where(chosen < 0, 0, found))
