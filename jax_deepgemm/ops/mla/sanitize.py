"""Calls for compute-sanitizer: pages and named keys, parts of sequences, teams, lengths beyond limits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.mla.api import paged_mla_attention, sparse_mla_attention

PAGES, PAGE, DEPTH = 40, 32, 576


def cases() -> Iterator[Case]:
    """Yields both ops, each of few heads and of many."""
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(PAGES, PAGE, DEPTH)), jnp.bfloat16)
    tables = jnp.asarray(rng.permutation(PAGES + 8)[: 4 * 11].reshape(4, 11) - 4, jnp.int32)
    starts = jnp.asarray([0, 1, 5, 5, 2**31 - 1], jnp.int32)
    lens = jnp.asarray([300, 2**31 - 1, 7, 1], jnp.int32)
    for heads in (16, 128):
        q = jnp.asarray(rng.normal(size=(8, heads, DEPTH)), jnp.bfloat16)
        for split in ("auto", 256):
            run = functools.partial(paged_mla_attention, scale=0.07, split=split)
            yield Case(f"latent, pages, h={heads} split={split}", run, (q, cache, tables, starts, lens))
        named = jnp.asarray(rng.integers(-5, PAGES * PAGE + 5, (8, 301)), jnp.int32)
        run = functools.partial(sparse_mla_attention, scale=0.07)
        yield Case(f"latent, slots, h={heads}", run, (q, cache, named))
